"""Suggests limits from the peaks of tests, and finds limits that are far too large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_gpumem.cards import CARDS
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.records.record import Record

#: The room above the peak, because another version of a library may need a little more.
HEAD_ROOM: Final = 1.1
#: A limit of more than this many times the peak is too generous.
GENEROUS: Final = 1.5
_MIB: Final = 2**20


def allocated_bytes(test: Record) -> int:
    """Return the allocated peak of a test's call, on the card with the largest peak."""
    peaks = (each.peak_allocated_bytes for each in test.of_phase("call"))
    return max(peaks, default=0)


def _reserved_bytes(test: Record) -> int:
    """Return the most bytes that PyTorch held of a card in any phase of a test."""
    return max((each.peak_reserved_bytes for each in test.figures), default=0)


def suggested_limit(peak_bytes: int) -> int:
    """Return a limit for a peak: a tenth more, rounded up to a short number.

    The step is 1 MiB, and a sixteenth or less of larger figures.
    """
    wanted = int(peak_bytes * HEAD_ROOM)
    step = max(_MIB, 1 << max(wanted.bit_length() - 5, 0))
    return -(-wanted // step) * step


def size_text(nbytes: int) -> str:
    """Return a size as text for a marker, exact to the byte."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes % size == 0:
            return f"{nbytes // size}{unit}"
    return str(nbytes)


def missing(tests: Iterable[Record]) -> dict[str, int]:
    """Return limits for tests without a limit; for a parametrised test the largest."""
    limits: dict[str, int] = {}
    for each in tests:
        peak = allocated_bytes(each)
        if each.max_vram_bytes is None and peak:
            name = function_of(each.nodeid)
            limits[name] = max(limits.get(name, 0), suggested_limit(peak))
    return limits


def too_generous(tests: Iterable[Record]) -> list[tuple[Record, int]]:
    """Return tests with a limit far above their peak, each with a suggested limit.

    For a parametrised test the largest peak counts, because all share one marker.
    """
    largest: dict[str, Record] = {}
    for each in tests:
        if each.max_vram_bytes is not None and allocated_bytes(each):
            name = function_of(each.nodeid)
            largest[name] = max(largest.get(name, each), each, key=allocated_bytes)
    found = []
    for each in largest.values():
        peak, limit = allocated_bytes(each), each.max_vram_bytes or 0
        enough = suggested_limit(peak)
        if limit > GENEROUS * peak and limit > enough:
            found.append((each, enough))
    return found


def function_of(test: str) -> str:
    """Return a test's id without its parameters."""
    return test.partition("[")[0]


def suggestion_lines(tests: Iterable[Record]) -> list[str]:
    """Return the suggestions for tests that passed, as lines."""
    ordered = sorted(tests, key=lambda each: each.nodeid)
    lines = []
    by_function: dict[str, int] = {}
    for each in ordered:
        name = function_of(each.nodeid)
        by_function[name] = max(by_function.get(name, 0), allocated_bytes(each))
    for name, limit in missing(ordered).items():
        lines.append(
            f'{name}: @pytest.mark.max_vram("{size_text(limit)}")  # peak '
            f"{format_size(by_function[name])}"
        )
    for each, enough in too_generous(ordered):
        peak, limit = allocated_bytes(each), each.max_vram_bytes or 0
        lines.append(
            f"{each.nodeid}: its limit of {format_size(limit)} is {limit / peak:.1f} "
            f"times its peak of {format_size(peak)}; {size_text(enough)} would do"
        )
    return lines + budget_lines(ordered) + _cards(ordered)


def budget_lines(tests: Iterable[Record]) -> list[str]:
    """Return the smallest budgets that were found, as lines."""
    lines = []
    for each in sorted(tests, key=lambda each: each.nodeid):
        note = each.smallest_budget_note
        if each.smallest_budget_bytes is not None:
            size = format_size(each.smallest_budget_bytes)
            more = f"; {note}" if note else ""
            lines.append(f"{each.nodeid}: passes from a budget of {size} on{more}")
        elif note:
            lines.append(f"{each.nodeid}: its smallest budget was {note}")
    return lines


def _cards(tests: list[Record]) -> list[str]:
    """Return a line that names the cards of the table on which the suite fits."""
    if not tests:
        return []
    worst = max(tests, key=_reserved_bytes)
    needed = _reserved_bytes(worst)
    # For a card without its own memory, its share of the host's memory is not known.
    rooms = {
        name: card.total_bytes - card.context_bytes
        for name, card in CARDS.items()
        if not card.is_integrated
    }
    fits = [name for name, room in rooms.items() if room >= needed]
    needs = f"the suite needs {format_size(needed)} beside the context ({worst.nodeid})"
    if not fits:
        return [f"{needs}; none of the {len(rooms)} cards that are known has that"]
    smallest = min(fits, key=rooms.__getitem__)
    return [
        f"{needs}; it fits on {len(fits)} of the {len(rooms)} cards that are known, of "
        f"which {smallest} is the smallest"
    ]
