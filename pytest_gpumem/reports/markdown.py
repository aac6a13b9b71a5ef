"""A run's record as Markdown, for pull requests and step summaries."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Final

from pytest_gpumem.records.staircase import staircase_table
from pytest_gpumem.reports.descriptions import (
    environment_line,
    kinds_words,
    limit_words,
    outcome_words,
)
from pytest_gpumem.sizes import format_size
from pytest_gpumem.sweeps.sweep_record import whole_sweeps
from pytest_gpumem.sweeps.text import summarise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_gpumem.records.record import LimitOutcome, Record
    from pytest_gpumem.records.run_record import BaselineOutcome, Entry
    from pytest_gpumem.reports.document import Report

#: The most entries of each kind that are shown, because a step's summary has room for
#: 1 MiB.
TOP: Final = 20


def escape(text: str) -> str:
    """Return text with escapes, so that a cell of a table shows it unchanged."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for sign in "\\`|*_[]~":
        escaped = escaped.replace(sign, f"&#{ord(sign)};")
    return escaped


def markdown(report: Report) -> str:
    """Return the report's text."""
    outcomes = outcome_words(report.outcomes)
    about = (
        *filter(None, (outcomes,)),
        *report.runs,
        *map(environment_line, report.environments),
    )
    lines = ["## GPU memory", "", *(escape(each) + "  " for each in about), ""]
    lines += _baseline(report.baseline)
    if not any(test.figures for test in report.tests):
        return "\n".join([*lines, "No test used a card.", ""])
    lines += _limits(report.tests)
    lines += _peaks(report.tests)
    lines += _sweeps(report.tests)
    lines += _fallbacks(report.tests)
    return "\n".join([*lines, ""])


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], num_left: int
) -> list[str]:
    """Return a table; a head that begins with ``>`` marks a column of numbers."""
    lines = [
        f"| {' | '.join(each.lstrip('>') for each in heads)} |",
        f"| {' | '.join('---:' if each[0] == '>' else '---' for each in heads)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return lines + _more(num_left)


def _more(num_left: int) -> list[str]:
    return [*(["", f"… and {num_left} more."] if num_left > 0 else []), ""]


def _peaks(tests: Sequence[Record]) -> list[str]:
    tops = [(test, top) for test in tests for top in (test.top_figures(),) if top]
    tops.sort(key=lambda pair: -pair[1].peak_allocated_bytes)
    rows = [
        (
            escape(test.nodeid),
            escape(test.outcome),
            format_size(figures.peak_allocated_bytes),
            format_size(figures.peak_reserved_bytes),
            format_size(figures.end_allocated_bytes),
            str(figures.num_ooms),
            format_size(n) if (n := test.peak_host_bytes) else "-",
        )
        for test, figures in tops[:TOP]
    ]
    heads = [
        *("test", "outcome", ">peak allocated", ">peak reserved", ">left", ">OOMs"),
        ">peak host",
    ]
    shown = len(heads)
    if not any(test.peak_host_bytes for test, _figures in tops[:TOP]):
        shown -= 1
    lines = _table(heads[:shown], [row[:shown] for row in rows], len(tops) - TOP)
    kinds = [
        (escape(test.nodeid), escape(kinds_words(figures.kinds)))
        for test, figures in tops[:TOP]
        if figures.kinds
    ]
    return lines + (
        _table(("test", "allocated at its peak"), kinds, 0) if kinds else []
    )


def _limits(tests: Sequence[Record]) -> list[str]:
    limits = [(test.nodeid, limit) for test in tests for limit in test.limits]
    broken = [(name, limit) for name, limit in limits if not limit.held]
    if not limits:
        return []
    if not broken:
        return [f"All {len(limits)} limits held.", ""]
    rows = [
        (
            escape(name),
            escape(limit_words(limit)),
            format_size(limit.limit_bytes),
            format_size(limit.measured_bytes),
            f"{_excess(limit)} ❌",
        )
        for name, limit in broken[:TOP]
    ]
    heads = ("test", "limit on", ">limit", ">measured", ">Δ")
    return [
        f"**{len(broken)} of {len(limits)} limits broken**",
        "",
        *_table(heads, rows, len(broken) - TOP),
    ]


def _excess(limit: LimitOutcome) -> str:
    """Return by how much a limit was broken; unknown bytes also break a limit."""
    excess = limit.measured_bytes - limit.limit_bytes
    return f"+{format_size(excess)}" if excess > 0 else "not known"


def _baseline(baseline: BaselineOutcome | None) -> list[str]:
    if baseline is None:
        return []
    changes = sorted(baseline.changes, key=lambda each: -abs(each.excess))
    title = f"{len(changes)} change{'s' * (len(changes) != 1)} against {escape(baseline.file)}"
    counts = "".join(
        f", {len(entries)} {word}"
        for word, entries in (("new", baseline.new), ("stale", baseline.stale))
        if entries
    )
    lines = [f"**{title}{counts}**", ""]
    if changes:
        rows = [
            (
                escape(each.test),
                escape(each.metric),
                format_size(each.before),
                format_size(each.now),
                each.excess_text + " ❌" * each.is_regression,
            )
            for each in changes[:TOP]
        ]
        heads = ("test", "metric", ">before", ">now", ">Δ")
        lines += _table(heads, rows, len(changes) - TOP)
    lines += _entries("new: not in the baseline", baseline.new)
    return lines + _entries("stale", baseline.stale)


def _entries(word: str, entries: Sequence[Entry]) -> list[str]:
    if not entries:
        return []
    rows = (
        (
            escape(each.test),
            escape(
                ", ".join(
                    f"{name} {format_size(n)}"
                    for name, n in each.peaks.items()
                    if name.endswith(("allocated", "reserved"))
                )
            ),
            escape(each.environment),
        )
        for each in entries[:TOP]
    )
    return _table((word, "peaks", "environment"), rows, len(entries) - TOP)


def _sweeps(tests: Sequence[Record]) -> Iterator[str]:
    whole = whole_sweeps(each for test in tests for each in test.sweeps)
    worst = sorted(whole, key=lambda each: -each.failures)
    for sweep in worst[:TOP]:
        yield f"- sweep {escape(sweep.nodeid)}: {escape(summarise(sweep))}"
    if worst:
        yield from _more(len(worst) - TOP)


def _fallbacks(tests: Sequence[Record]) -> Iterator[str]:
    worst = sorted(
        ((test.nodeid, steps) for test in tests for steps in test.fallbacks),
        key=lambda pair: -sum(len(step.problems) for step in pair[1]),
    )
    for nodeid, steps in worst[:TOP]:
        table = html.escape(staircase_table(steps), quote=False)
        yield from (f"- fallback {escape(nodeid)}", "", f"<pre>{table}</pre>")
    if worst:
        yield from _more(len(worst) - TOP)
