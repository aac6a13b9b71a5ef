"""A run's record as Markdown, for pull requests and step summaries."""

from __future__ import annotations

import heapq
import html
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.records.staircase import staircase_table
from pytest_gpumem.reports.recorded import top_figures
from pytest_gpumem.reports.words import environment_line, limit_words
from pytest_gpumem.sizes import format_size
from pytest_gpumem.sweeps.summary import SweepSummary
from pytest_gpumem.sweeps.text import summarise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pytest_gpumem.reports.document import Report

#: Entries of each kind that are shown: a step's summary has room for 1 MiB.
TOP: Final = 20


def escape(text: str) -> str:
    """Return text that means itself in a cell of a table."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for sign in "\\`|*_[]~":
        escaped = escaped.replace(sign, f"&#{ord(sign)};")
    return escaped


class _Found:
    """What is shown of the tests, gathered by one look at each."""

    def __init__(self, report: Report) -> None:
        self.peaks: list[tuple[int, int]] = []
        self.broken: list[tuple[str, Mapping[str, Any]]] = []
        self.num_limits = 0
        entries: list[Mapping[str, Any]] = []
        self.fallbacks: list[tuple[str, list[dict[str, Any]]]] = []
        for position, test in enumerate(report.tests):
            record = test.record()
            self._take(position, record)
            entries += record["sweeps"]
        self.sweeps: Final = SweepSummary.whole(entries)

    def _take(self, position: int, record: Mapping[str, Any]) -> None:
        top = top_figures(record)
        if top is not None:
            self.peaks.append((top["peak_allocated_bytes"], -position))
        self.num_limits += len(record["limits"])
        self.broken += [
            (record["nodeid"], limit) for limit in record["limits"] if not limit["held"]
        ]
        self.fallbacks += [(record["nodeid"], each) for each in record["fallbacks"]]


def markdown(report: Report) -> str:
    """Return the report's text."""
    found = _Found(report)
    about = (*report.runs, *map(environment_line, report.environments))
    lines = ["## GPU memory", "", *(escape(each) + "  " for each in about), ""]
    lines += _baseline(report.baseline)
    if not found.peaks:
        return "\n".join([*lines, "No test used a card.", ""])
    lines += _limits(found)
    lines += _peaks(report, found)
    lines += _sweeps(found)
    lines += _fallbacks(found)
    return "\n".join([*lines, ""])


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], num_left: int
) -> list[str]:
    """Return a table: heads that begin with ``>`` are of numbers."""
    lines = [
        f"| {' | '.join(each.lstrip('>') for each in heads)} |",
        f"| {' | '.join('---:' if each[0] == '>' else '---' for each in heads)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return lines + _more(num_left)


def _more(num_left: int) -> list[str]:
    return [*(["", f"… and {num_left} more."] if num_left > 0 else []), ""]


def _peaks(report: Report, found: _Found) -> list[str]:
    rows = []
    for _peak, position in heapq.nlargest(TOP, found.peaks):
        record = report.tests[-position].record()
        figures = top_figures(record) or {}
        rows.append(
            (
                escape(record["nodeid"]),
                escape(record["outcome"]),
                format_size(figures["peak_allocated_bytes"]),
                format_size(figures["peak_reserved_bytes"]),
                format_size(figures["end_allocated_bytes"]),
                str(figures["num_ooms"]),
            )
        )
    heads = ("test", "outcome", ">peak allocated", ">peak reserved", ">left", ">OOMs")
    return _table(heads, rows, len(found.peaks) - TOP)


def _limits(found: _Found) -> list[str]:
    if not found.num_limits:
        return []
    if not found.broken:
        return [f"All {found.num_limits} limits held.", ""]
    rows = [
        (
            escape(test),
            escape(limit_words(limit)),
            format_size(limit["limit_bytes"]),
            format_size(limit["measured_bytes"]),
            f"{_excess(limit)} ❌",
        )
        for test, limit in found.broken[:TOP]
    ]
    return [
        f"**{len(found.broken)} of {found.num_limits} limits broken**",
        "",
        *_table(
            ("test", "limit on", ">limit", ">measured", ">Δ"),
            rows,
            len(found.broken) - TOP,
        ),
    ]


def _excess(limit: Mapping[str, Any]) -> str:
    """Return by how much a limit was broken; what is not known breaks it too."""
    excess = limit["measured_bytes"] - limit["limit_bytes"]
    return f"+{format_size(excess)}" if excess > 0 else "not known"


def _baseline(baseline: Mapping[str, Any] | None) -> list[str]:
    if baseline is None:
        return []
    changes, new, stale = (baseline[each] for each in ("changes", "new", "stale"))
    changes = sorted(changes, key=lambda each: -abs(each["now"] - each["before"]))
    title = f"{len(changes)} change{'s' * (len(changes) != 1)} against {escape(baseline['file'])}"
    counts = "".join(
        f", {len(entries)} {word}"
        for word, entries in (("new", new), ("stale", stale))
        if entries
    )
    lines = [f"**{title}{counts}**", ""]
    if changes:
        rows = []
        for each in changes[:TOP]:
            delta = each["now"] - each["before"]
            mark = " ❌" if each["is_regression"] else ""
            rows.append(
                (
                    escape(each["test"]),
                    escape(each["metric"]),
                    format_size(each["before"]),
                    format_size(each["now"]),
                    f"{'+' if delta >= 0 else '-'}{format_size(abs(delta))}{mark}",
                )
            )
        heads = ("test", "metric", ">before", ">now", ">Δ")
        lines += _table(heads, rows, len(changes) - TOP)
    for word, entries in (("new: not in the baseline", new), ("stale", stale)):
        lines += _entries(word, entries)
    return lines


def _entries(word: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    if not entries:
        return []
    rows = (
        (
            escape(each["test"]),
            escape(
                ", ".join(
                    f"{name} {format_size(n)}"
                    for name, n in each["peaks"].items()
                    if name.endswith(("allocated", "reserved"))
                )
            ),
            escape(each["environment"]),
        )
        for each in entries[:TOP]
    )
    return _table((word, "peaks", "environment"), rows, len(entries) - TOP)


def _sweeps(found: _Found) -> Iterator[str]:
    worst = sorted(found.sweeps.items(), key=lambda pair: -pair[1].num_failures)
    for (nodeid, _name), summary in worst[:TOP]:
        yield f"- sweep {escape(nodeid)}: {escape(summarise(summary))}"
    if worst:
        yield from _more(len(worst) - TOP)


def _fallbacks(found: _Found) -> Iterator[str]:
    worst = sorted(
        found.fallbacks,
        key=lambda pair: -sum(len(step["problems"]) for step in pair[1]),
    )
    for nodeid, steps in worst[:TOP]:
        table = html.escape(staircase_table(steps), quote=False)
        yield from (f"- fallback {escape(nodeid)}", "", f"<pre>{table}</pre>")
    if worst:
        yield from _more(len(worst) - TOP)
