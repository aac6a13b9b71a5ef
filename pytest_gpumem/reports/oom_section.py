"""Describes the moment at which memory ran out, as lines with advice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.records.incidents import remedies
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.records.incidents import Incident

#: Heading of the section in a failure's report.
TITLE = "GPU memory"


def headline(incident: Incident) -> str:
    """Return what happened, on one line."""
    if incident.kind == "limit":
        what = f"{incident.limit} was broken on"
    elif incident.injected_by is not None:
        what = f"an OOM was injected by the rule {incident.injected_by} on"
    else:
        what = "an allocation failed on"
    budget = (
        "no budget"
        if incident.budget_bytes is None
        else f"a budget of {format_size(incident.budget_bytes)}"
    )
    return (
        f"{what} cuda:{incident.device_index} ({incident.card}, "
        f"{format_size(incident.total_bytes)}), {budget}"
    )


def section_lines(incident: Incident, *, count: int = 1) -> list[str]:
    """Return the section's lines.

    Args:
        incident: The moment.
        count: The number of incidents; this one is the last.
    """
    lines = [headline(incident)]
    if count > 1:
        lines.append(f"it is the last of {count} OOMs or broken limits in this test")
    lines += _figures(incident)
    lines += _tensors(incident)
    for process in incident.processes:
        name = f" ({process.name})" if process.name else ""
        lines.append(
            f"another process on the card: {process.pid}{name} holds "
            f"{format_size(process.nbytes)}"
        )
    lines += _advice(incident)
    if incident.note:
        lines.append(incident.note)
    return lines


def _figures(incident: Incident) -> Iterator[str]:
    yield (
        f"allocated {format_size(incident.allocated_bytes)}, reserved "
        f"{format_size(incident.reserved_bytes)}, fragmented "
        f"{format_size(incident.fragmented_bytes)} (largest free block "
        f"{format_size(incident.largest_free_bytes)}); this process may hold "
        f"{format_size(incident.room_bytes)}"
    )
    verb = "exceeded it with a request of" if incident.kind == "limit" else "requested"
    yield f"{verb} {format_size(incident.nbytes)} at {incident.site}"


def _tensors(incident: Incident) -> Iterator[str]:
    if incident.tensors:
        yield (
            f"largest live tensors, of {incident.num_tensors} with "
            f"{format_size(incident.seen_bytes)}:"
        )
    width = max((len(format_size(each.nbytes)) for each in incident.tensors), default=0)
    for each in incident.tensors:
        owner = f"  {each.owner}" if each.owner else ""
        yield f"  {format_size(each.nbytes).rjust(width)}  {each.what}{owner}"
    unseen = incident.allocated_bytes - incident.seen_bytes
    if incident.num_tensors and unseen >= 2**20:
        # The request that went over a limit was granted, but is no tensor yet.
        new = "the new request, " if incident.kind == "limit" else ""
        yield (
            f"{format_size(unseen)} more that no Python object shows ({new}saved for "
            "backward, library workspaces, rounding)"
        )


def _advice(incident: Incident) -> Iterator[str]:
    if incident.injected_by is not None or incident.kind == "limit":
        return
    yield (
        f"needed at least {format_size(incident.needed_bytes)}: live "
        f"{format_size(incident.allocated_bytes)}"
        + (
            f", weights not loaded yet {format_size(incident.missing_bytes)}"
            if incident.missing_bytes
            else ""
        )
        + (
            f", this request {format_size(incident.request_bytes)}"
            if incident.request_bytes
            else ""
        )
    )
    if incident.needed_bytes <= incident.room_bytes:
        yield (
            f"  that is not more than {format_size(incident.room_bytes)}: rounding and "
            "fragments took the rest; PYTORCH_ALLOC_CONF=expandable_segments:True may "
            "help"
        )
    found = remedies(incident)
    if found:
        yield "changes that need less memory at this point (later requests are not counted):"
    for each in found:
        verdict = "would fit" if each.fits else "would not fit"
        yield (
            f"  {each.name}: {verdict} ({format_size(each.needed_bytes)} of "
            f"{format_size(incident.room_bytes)}): {each.reason}"
        )
