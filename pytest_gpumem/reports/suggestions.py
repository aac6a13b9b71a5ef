"""Suggests limits from the peaks of tests, and finds limits that are far too large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pytest_gpumem.cards import CARDS
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_gpumem.records.record import Record

#: The room above the peak, because another version of a library may need a little more.
HEAD_ROOM: Final = 1.1
#: A limit of more than this many times the peak is too generous.
GENEROUS: Final = 1.5
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Peak:
    """The needs of a test that passed.

    Attributes:
        test: The test.
        allocated_bytes: The peak of its call, on the card with the largest peak.
        reserved_bytes: The most bytes that PyTorch held of a card in any phase.
        limit_bytes: The limit on allocated bytes that its markers set, or None.
        smallest_budget: The smallest budget with which it passes, if it is known.
        budget_note: Why the smallest budget is not known, or what failed in the search.
    """

    test: str
    allocated_bytes: int
    reserved_bytes: int
    limit_bytes: int | None = None
    smallest_budget: int | None = None
    budget_note: str = ""

    @classmethod
    def of(cls, test: Record) -> Peak:
        """Return the needs of a test with figures of its call."""
        return cls(
            test.nodeid,
            max(each.peak_allocated_bytes for each in test.of_phase("call")),
            max(each.peak_reserved_bytes for each in test.figures),
            test.max_vram_bytes,
            test.smallest_budget_bytes,
            test.smallest_budget_note,
        )


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


def missing(peaks: Iterable[Peak]) -> dict[str, int]:
    """Return limits for tests without a limit; for a parametrised test the largest."""
    limits: dict[str, int] = {}
    for each in peaks:
        if each.limit_bytes is None and each.allocated_bytes:
            name = function_of(each.test)
            limit = suggested_limit(each.allocated_bytes)
            limits[name] = max(limits.get(name, 0), limit)
    return limits


def too_generous(peaks: Iterable[Peak]) -> list[tuple[Peak, int]]:
    """Return tests with a limit far above their peak, each with a suggested limit.

    For a parametrised test the largest peak counts, because all share one marker.
    """
    largest: dict[str, Peak] = {}
    for each in peaks:
        if each.limit_bytes is not None and each.allocated_bytes:
            name = function_of(each.test)
            other = largest.get(name)
            if other is None or each.allocated_bytes > other.allocated_bytes:
                largest[name] = each
    found = []
    for each in largest.values():
        enough = suggested_limit(each.allocated_bytes)
        limit = each.limit_bytes or 0
        if limit > GENEROUS * each.allocated_bytes and limit > enough:
            found.append((each, enough))
    return found


def function_of(test: str) -> str:
    """Return a test's id without its parameters."""
    return test.partition("[")[0]


def suggestion_lines(peaks: Mapping[str, Peak]) -> list[str]:
    """Return the suggestions as lines."""
    ordered = [peaks[test] for test in sorted(peaks)]
    lines = []
    by_function: dict[str, int] = {}
    for each in ordered:
        name = function_of(each.test)
        by_function[name] = max(by_function.get(name, 0), each.allocated_bytes)
    for name, limit in missing(ordered).items():
        lines.append(
            f'{name}: @pytest.mark.max_vram("{size_text(limit)}")  # peak '
            f"{format_size(by_function[name])}"
        )
    for each, enough in too_generous(ordered):
        limit = each.limit_bytes or 0
        lines.append(
            f"{each.test}: its limit of {format_size(limit)} is "
            f"{limit / each.allocated_bytes:.1f} times its peak of "
            f"{format_size(each.allocated_bytes)}; {size_text(enough)} would do"
        )
    return lines + budget_lines(peaks) + _cards(ordered)


def budget_lines(peaks: Mapping[str, Peak]) -> list[str]:
    """Return the smallest budgets that were found, as lines."""
    lines = []
    for test in sorted(peaks):
        each = peaks[test]
        if each.smallest_budget is not None:
            size = format_size(each.smallest_budget)
            note = f"; {each.budget_note}" if each.budget_note else ""
            lines.append(f"{test}: passes from a budget of {size} on{note}")
        elif each.budget_note:
            lines.append(f"{test}: its smallest budget was {each.budget_note}")
    return lines


def _cards(peaks: list[Peak]) -> list[str]:
    """Return a line that names the cards of the table on which the suite fits."""
    if not peaks:
        return []
    worst = max(peaks, key=lambda each: each.reserved_bytes)
    # How much of the host's memory a card without its own may have is not known.
    rooms = {
        name: card.total_bytes - card.context_bytes
        for name, card in CARDS.items()
        if not card.is_integrated
    }
    fits = [name for name, room in rooms.items() if room >= worst.reserved_bytes]
    needs = (
        f"the suite needs {format_size(worst.reserved_bytes)} beside the context "
        f"({worst.test})"
    )
    if not fits:
        return [f"{needs}; none of the {len(rooms)} cards that are known has that"]
    smallest = min(fits, key=rooms.__getitem__)
    return [
        f"{needs}; it fits on {len(fits)} of the {len(rooms)} cards that are known, of "
        f"which {smallest} is the smallest"
    ]
