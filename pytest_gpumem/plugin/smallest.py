"""``--gpu-find-budget``: from which budget on a test passes, by bisection."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.plugin.marks import SMALLEST_PROPERTY

if TYPE_CHECKING:
    from pytest_gpumem.plugin.session import Run

#: The driver hands out memory in such pieces: budgets between them are the same.
STEP: Final = 2 * 2**20


class SmallestBudgets:
    """Runs each test again under other budgets, before its own run.

    Every trial is the whole test: setup with fixtures made anew, call and teardown;
    fixtures of wider scope stay. Nothing of a trial is reported.

    Args:
        run: The run, whose budget is changed.

    Limits: a test that passes with much and with little, and fails between, is searched
    as if it failed below the point found. Tests with sweeps, subtests or ``unittest``
    classes report while they run, and are left out.
    """

    def __init__(self, run: Run) -> None:
        self._run: Final = run

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Search, then let the test run as ever."""
        if not _suits(item):
            return
        witness = self._run.witness
        with nullcontext() if witness is None else witness.paused():
            smallest = self._search(item)
        if smallest is not None:
            item.user_properties.append((SMALLEST_PROPERTY, smallest))

    def _search(self, item: pytest.Item) -> int | None:
        """Return the budget in bytes; None if the test fails or uses no card."""
        passes, peak = self._try(item, None)
        if not passes or not peak:
            return None
        low, high = 0, -(-peak // STEP)
        if not self._try(item, high * STEP)[0]:
            return None  # it does not do the same each time
        while high - low > 1:
            middle = (low + high) // 2
            if self._try(item, middle * STEP)[0]:
                high = middle
            else:
                low = middle
        return high * STEP

    def _try(self, item: pytest.Item, budget: int | None) -> tuple[bool, int]:
        """Run a test unseen; return whether it passed, and its peak of reserved bytes."""
        from pytest_gpumem.model.records import from_properties  # noqa: PLC0415  # there is a test

        runner: Any = item.config.pluginmanager.get_plugin("runner")
        parent: Any = item.parent  # as the next test: what is wider stays
        properties, sections = item.user_properties, item._report_sections  # noqa: SLF001  # pytest keeps output there
        marks = (len(properties), len(sections))
        self._run.trial_bytes = budget
        try:
            reports = runner.runtestprotocol(item, log=False, nextitem=parent)
            figures = from_properties(dict(properties[marks[0] :]))
        finally:
            self._run.trial_bytes = None
            del properties[marks[0] :]
            del sections[marks[1] :]
        peak = max((each.peak_reserved_bytes for each in figures.values()), default=0)
        return all(each.passed for each in reports), peak


def _suits(item: pytest.Item) -> bool:
    names = {mark.name for mark in item.iter_markers()}
    bases = getattr(getattr(item, "cls", None), "__mro__", ())
    return (
        isinstance(item, pytest.Function)
        and not names & {"oom_sweep", "oom_fallback", "skip"}
        and not {"subtests", "oom_sweep"} & set(item.fixturenames)
        and all(base.__module__ != "unittest.case" for base in bases)
    )
