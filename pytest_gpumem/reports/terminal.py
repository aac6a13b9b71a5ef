"""The table of peaks as lines of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pytest_gpumem.reports.descriptions import kinds_words
from pytest_gpumem.sizes import format_size
from pytest_gpumem.tables import align

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.records.record import PhaseFigures, Record

#: The most tests that are shown without ``-v``.
TOP: Final = 20
_HEAD: Final = ("peak allocated", "peak reserved", "left", "OOMs", "retries", "test")
#: Columns that are also shown if NVML was asked.
_DRIVER_HEAD: Final = ("peak process", "peak card")
#: The column that is also shown with ``-v`` if its figures are known.
_FRAGMENTED: Final = "fragmented"
#: The column that is also shown with ``-v`` if it is known.
_HOST: Final = "peak host"


class _Row(NamedTuple):
    """The figures of one phase of one test on one card."""

    nodeid: str
    figures: PhaseFigures
    host_bytes: int | None


def peak_table(tests: Iterable[Record], *, detailed: bool) -> list[str]:
    """Return the table's lines, largest peak first; none if there are no figures.

    Args:
        tests: The tests.
        detailed: Whether every test and phase is shown, not only the calls of the
            largest ``TOP``.
    """
    rows = [
        _Row(test.nodeid, each, test.peak_host_bytes)
        for test in tests
        for each in test.figures
    ]
    if not rows:
        return []
    shown = rows if detailed else _calls(rows)
    shown.sort(key=lambda row: (-row.figures.peak_allocated_bytes, row.nodeid))
    hidden = 0 if detailed else max(len(shown) - TOP, 0)
    shown = shown[: len(shown) - hidden]
    many = len({row.figures.device_index for row in shown}) > 1
    cells = [_HEAD, *(_cells(row, name_device=many) for row in shown)]
    if detailed and any(row.figures.peak_fragmented_bytes for row in shown):
        bytes_of = [row.figures.peak_fragmented_bytes for row in shown]
        column = [_FRAGMENTED, *(format_size(n) if n else "-" for n in bytes_of)]
        cells = [
            (*own[:-1], more, own[-1]) for own, more in zip(cells, column, strict=True)
        ]
    if detailed and any(_tells_more(row.figures) for row in shown):
        told = [_DRIVER_HEAD, *(_driver_cells(row.figures) for row in shown)]
        cells = [
            (*own[:2], *more, *own[2:]) for own, more in zip(cells, told, strict=True)
        ]
    if detailed and any(row.host_bytes for row in shown):
        host = [
            _HOST,
            *(format_size(n) if (n := row.host_bytes) else "-" for row in shown),
        ]
        cells = [
            (*own[:-1], more, own[-1]) for own, more in zip(cells, host, strict=True)
        ]
    lines = align(cells)
    if detailed:
        lines += _kinds_lines(shown)
    if hidden:
        lines.append(f"... and {hidden} more with smaller peaks; -v shows all")
    return lines


def _kinds_lines(rows: Iterable[_Row]) -> list[str]:
    """Return what the largest peaks are made of; none if no kinds were recorded."""
    told = [row for row in rows if row.figures.kinds]
    if not told:
        return []
    return [
        "allocated at the peak, by kind:",
        *(
            f"  {row.nodeid}{_phase(row)}: {kinds_words(row.figures.kinds)}"
            for row in told[:TOP]
        ),
    ]


def _phase(row: _Row) -> str:
    return "" if row.figures.phase == "call" else f" ({row.figures.phase})"


def _tells_more(figures: PhaseFigures) -> bool:
    """Tell whether NVML was sampled; the bytes of the context alone are not enough."""
    process = figures.peak_process_bytes
    if figures.peak_card_bytes is not None:
        return True
    known = figures.peak_reserved_bytes + figures.context_bytes
    return process is not None and process != known


def _driver_cells(figures: PhaseFigures) -> tuple[str, str]:
    process, card = (
        "unknown" if nbytes is None else format_size(nbytes)
        for nbytes in (figures.peak_process_bytes, figures.peak_card_bytes)
    )
    return process, card


def _calls(rows: Iterable[_Row]) -> list[_Row]:
    """Return one phase of each test: its call, or the phase with the peak without a call.

    The figures of the test's child processes follow.
    """
    best: dict[tuple[str, int, bool], _Row] = {}
    for row in rows:
        key = (row.nodeid, row.figures.device_index, row.figures.phase == "children")
        other = best.get(key)
        if other is None or _weight(row) > _weight(other):
            best[key] = row
    return list(best.values())


def _weight(row: _Row) -> tuple[bool, int]:
    return row.figures.phase == "call", row.figures.peak_allocated_bytes


def _cells(row: _Row, *, name_device: bool) -> tuple[str, ...]:
    figures = row.figures
    device = f" [cuda:{figures.device_index}]" if name_device else ""
    return (
        format_size(figures.peak_allocated_bytes),
        format_size(figures.peak_reserved_bytes),
        format_size(figures.end_allocated_bytes)
        if figures.end_allocated_bytes
        else "-",
        str(figures.num_ooms) if figures.num_ooms else "-",
        str(figures.num_alloc_retries) if figures.num_alloc_retries else "-",
        row.nodeid + _phase(row) + device,
    )
