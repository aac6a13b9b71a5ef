"""A report's page and Markdown show names; whatever these are, they stay names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fuzzing import fuzz, texts
from hypothesis import example, given
from hypothesis import strategies as st
from pages import Page

import pytest_gpumem
from pytest_gpumem.records.memory_figures import MemoryFigures
from pytest_gpumem.records.record import (
    Contention,
    FallbackStep,
    LimitOutcome,
    PhaseFigures,
    Record,
    Replay,
    Sweep,
    SweptSite,
    Verdict,
    WiderFixture,
)
from pytest_gpumem.records.run_record import BaselineOutcome, Change, Entry
from pytest_gpumem.reports import document
from pytest_gpumem.reports.markdown import markdown
from pytest_gpumem.reports.page import page

SCRIPT = Path(pytest_gpumem.__file__).parent / "reports" / "templates" / "report.js"
NASTY = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]><svg onload=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "javascript:alert(1)",
    "\u2028alert(1)\u2029",
    "{{ 7 * 7 }}{% include 'report.js' %}",
    "&lt;/script&gt;",
    "\udc80\x00\x1b[31m",
    "|`*_[x](http://y)~#\n\n<b>",
)
_names = (
    st.sampled_from(NASTY)
    | texts
    | st.lists(st.sampled_from(NASTY) | texts, min_size=2, max_size=3).map("".join)
)


def a_report(name: str) -> document.Report:
    """Return a report in which everything that has a name has this one."""
    sweep = Sweep(
        name,
        name,
        recover=True,
        points=1,
        failures=1,
        resumed=0,
        seconds=0.1,
        sites=[SweptSite(name, 1, 1, {Verdict.LEAK: 1})],
        replays=[Replay(name, "leak", 1, name)],
    )
    card = {
        "device_index": 0,
        "budget_bytes": None,
        "total_bytes": 5,
        "num_events": 1,
        "peak_bytes": 5,
        "points": [[0, 5, 5]],
        "live_at_peak": [{"site": name, "bytes": 5}],
    }
    figures = MemoryFigures(0, 5, 5, 5, 5, 5, 5, 5, 5, 5)
    test = Record(
        name,
        "failed",
        0.1,
        name,
        [PhaseFigures.of("call", figures)],
        host=name,
        fixtures=[WiderFixture("module", name, 5)],
        limits=[LimitOutcome("allocated", 0, "call", 4, 5, held=False)],
        unknown=name,
        contention=Contention(0, 5, 5, 5, name),
        broken_limit=name,
        incident=name,
        sweeps=[sweep],
        fallbacks=[[FallbackStep(name, 5, name, name, 1, 5, 5, (name,), (name,))]],
        timeline=json.dumps([card]),
    )
    entry = Entry(name, name, {"allocated": 1})
    change = Change(name, "allocated", 1, 2, is_regression=True)
    baseline = BaselineOutcome(name, [change], [entry], [entry])
    return document.Report((name,), (), baseline, (test,))


HARMLESS = Page("".join(page(a_report("name"))))


@fuzz
@given(name=_names)
@example(name="".join(NASTY))
def test_no_name_adds_an_element_or_a_script_to_the_page(name: str) -> None:
    """Elements, attributes and scripts are those of a page with a harmless name."""
    report = a_report(name)

    made = Page("".join(page(report)))

    assert HARMLESS.elements == made.elements
    assert HARMLESS.scripts[1:] == made.scripts[1:]
    data = made.scripts[0]
    assert json.loads(document.to_text(report)) == json.loads(data)
    assert data.isascii()
    assert "<" not in data


@fuzz
@given(name=_names)
@example(name="".join(NASTY))
def test_no_name_adds_a_line_or_an_element_to_the_markdown(name: str) -> None:
    """The only elements are those of the fallback's table, which is text."""
    text = markdown(a_report(name))
    outside, _pre, table = text.partition("<pre>")

    assert "<" not in outside
    assert "<" not in table.removesuffix("</pre>\n").replace("</pre>", "", 1)
    harmless = markdown(a_report("name")).partition("<pre>")[0]
    assert _columns(harmless) == _columns(outside)


def _columns(text: str) -> list[int]:
    return [row.count("|") for row in text.splitlines() if row.startswith("| ")]


@pytest.mark.parametrize(
    "word",
    [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "createContextualFragment",
        "eval",
        "Function",
        "DOMParser",
        "setTimeout",
        "fetch",
        "href",
        "src",
    ],
)
def test_the_pages_script_takes_nothing_for_code(word: str) -> None:
    """What it shows goes through textContent and attributes with fixed names."""
    script = SCRIPT.read_text("utf-8")

    assert not re.search(rf"\b{re.escape(word)}\b", script)
