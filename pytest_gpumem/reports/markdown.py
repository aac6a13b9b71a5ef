"""A run's record as Markdown, for pull requests and step summaries."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.model.staircase import staircase_table
from pytest_gpumem.model.sweep_summary import SweepSummary
from pytest_gpumem.model.sweep_text import summarise
from pytest_gpumem.reports.document import top_figures
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Tests and changes that are shown.
TOP: Final = 20


def escape(text: str) -> str:
    """Return text that means itself in a cell of a table."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for sign in "\\`|*_[]~":
        escaped = escaped.replace(sign, f"&#{ord(sign)};")
    return escaped


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report's text."""
    tests = [each for each in report["tests"] if each["figures"]]
    figures = {each["nodeid"]: top_figures(each) or {} for each in tests}
    tests.sort(key=lambda each: -figures[each["nodeid"]]["peak_allocated_bytes"])
    lines = ["## GPU memory", "", *(escape(run) + "  " for run in report["runs"]), ""]
    lines += _changes(report.get("baseline"))
    if not tests:
        return "\n".join([*lines, "No test used a card.", ""])
    lines += [
        "| test | outcome | peak allocated | peak reserved | left | OOMs |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for test in tests[:TOP]:
        each = figures[test["nodeid"]]
        cells = [
            escape(test["nodeid"]),
            escape(test["outcome"]),
            format_size(each["peak_allocated_bytes"]),
            format_size(each["peak_reserved_bytes"]),
            format_size(each["end_allocated_bytes"]),
            str(each["num_ooms"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if len(tests) > TOP:
        lines += ["", f"… and {len(tests) - TOP} more with smaller peaks."]
    lines.append("")
    for test in report["tests"]:
        for sweep in test["sweeps"]:
            lines.append(
                f"- sweep {escape(sweep['nodeid'])}: {summarise(SweepSummary.from_json(sweep))}"
            )
        for steps in test["fallbacks"]:
            table = html.escape(staircase_table(steps), quote=False)
            lines += [f"- fallback {escape(test['nodeid'])}", "", f"<pre>{table}</pre>"]
    return "\n".join([*lines, ""])


def _changes(baseline: Mapping[str, Any] | None) -> list[str]:
    if baseline is None:
        return []
    changes = sorted(
        baseline["changes"], key=lambda each: -abs(each["now"] - each["before"])
    )
    lines = [f"**{len(changes)} changes against {escape(baseline['file'])}**", ""]
    if changes:
        lines += [
            "| test | metric | before | now | Δ |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
    for each in changes[:TOP]:
        mark = " ❌" if each["is_regression"] else ""
        delta = each["now"] - each["before"]
        sign = "+" if delta >= 0 else "-"
        lines.append(
            f"| {escape(each['test'])} | {escape(each['metric'])} | "
            f"{format_size(each['before'])} | {format_size(each['now'])} | "
            f"{sign}{format_size(abs(delta))}{mark} |"
        )
    if len(changes) > TOP:
        lines += ["", f"… and {len(changes) - TOP} more."]
    return [*lines, ""]
