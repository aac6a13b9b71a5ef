"""``--gpu-suggest=budgets``: finds the smallest budget of a test by bisection."""

from __future__ import annotations

import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.plugin.marks import is_swept
from pytest_gpumem.plugin.record_keeping import (
    detach,
    has_record,
    keep,
    record_of,
    taken,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pytest_gpumem.plugin.session import Run

#: The driver gives memory in multiples of this size, so budgets in between are equivalent.
STEP: Final = 2 * 2**20
#: A phase of a trial may take this many times as long as in the first trial, which has all
#: the memory, and at least this many seconds. A fallback may be slower.
PATIENCE: Final = 10
PATIENCE_S: Final = 10.0


class SmallestBudgets:
    """Runs each test again under other budgets, before its own run.

    Every trial runs the whole test: setup with new fixtures, call and teardown. Fixtures
    of wider scope are not made again. Trials are not reported. If a phase of a trial does
    not end, ``Watchdog`` interrupts it, and it counts as failed.

    Args:
        run: The run; its budget is changed.

    Limits: the search assumes that a test that passes with one budget also passes with
    every larger budget. For some tests no search is made, and the run says so: tests
    that report while they run (sweeps, the fixture ``subtests``), and doctests, which
    run only once.
    """

    def __init__(self, run: Run) -> None:
        self._run: Final = run
        self._is_trial = False
        self._patience_s: float | None = None
        self._num_hung = 0
        self._note = ""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None]:
        """Bound the phase, in a trial."""
        return (yield from self._bounded())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None]:
        """Bound the phase, in a trial."""
        return (yield from self._bounded())

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        """Bound the phase, in a trial; otherwise note why a test was not searched."""
        try:
            return (yield from self._bounded())
        finally:
            if self._note and has_record(item) and not self._is_trial:
                record_of(item).smallest_budget_note = self._note

    def _bounded(self) -> Generator[None]:
        if not self._is_trial or self._patience_s is None:
            return (yield)
        from pytest_gpumem.instruments.watchdog import Watchdog

        watchdog = Watchdog(self._patience_s)
        try:
            with watchdog:
                return (yield)
        finally:
            self._num_hung += watchdog.stacks is not None

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Search, then let the test run as usual."""
        self._note = self._why_not(item)
        if self._note or item.get_closest_marker("skip") is not None:
            return
        witness = self._run.witness
        with nullcontext() if witness is None else witness.paused():
            smallest = self._search(item)
        if smallest is not None:
            record_of(item).smallest_budget_bytes = smallest

    def _search(self, item: pytest.Item) -> int | None:
        """Return the budget in bytes; None if the test fails or uses no card."""
        self._patience_s, self._num_hung = None, 0
        start = time.perf_counter()
        passes, peak = self._try(item, None)
        if not passes or not peak:
            return None
        self._patience_s = max(PATIENCE * (time.perf_counter() - start), PATIENCE_S)
        low, high = 0, -(-peak // STEP)
        if not self._try(item, high * STEP)[0]:
            self._note = "not found: the test does not behave the same each time"
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._try(item, middle * STEP)[0]:
                high = middle
            else:
                low = middle
        if self._num_hung:
            self._note = (
                f"{self._num_hung} of the trials below did not end in "
                f"{self._patience_s:.3g} s"
            )
        return high * STEP

    def _try(self, item: pytest.Item, budget: int | None) -> tuple[bool, int]:
        """Run a test without a report; return whether it passed, and its reserved peak."""
        runner: Any = item.config.pluginmanager.get_plugin("runner")
        # The next test is the same, so that wider fixtures are not torn down.
        parent: Any = item.parent
        properties, sections = item.user_properties, item._report_sections  # noqa: SLF001  # pytest keeps the captured output there
        marks, before = (len(properties), len(sections)), taken(item)
        parts = _Parts(item)
        self._is_trial = True
        keep(item, None)
        try:
            with parts, self._capped(budget):
                reports = runner.runtestprotocol(item, log=False, nextitem=parent)
        finally:
            keep(item, before)
            self._is_trial = False
            del properties[marks[0] :]
            del sections[marks[1] :]
        record = detach(reports[-1])
        figures = [] if record is None else record.figures
        peak = max((each.peak_reserved_bytes for each in figures), default=0)
        return all(each.passed for each in reports) and not parts.has_failed, peak

    @contextmanager
    def _capped(self, budget: int | None) -> Iterator[None]:
        """Cap every card for a trial; the first has no cap, and may create the device."""
        device = self._run.device if budget is not None else None
        if device is None or budget is None:
            yield
            return
        cards = range(device.device_count)
        try:
            for index in cards:
                capped = min(budget, device.total_bytes(index))
                device.set_budget(index, capped, owner=self)
            yield
        finally:
            for index in cards:
                device.set_budget(index, None, owner=self)

    def _why_not(self, item: pytest.Item) -> str:
        """Return why a test is not searched; empty if it is."""
        if not isinstance(item, pytest.Function):
            return "not sought: only test functions are run again"
        sweeps_on_demand = self._run.settings.sweeps_on_demand
        if (
            is_swept(item, sweeps_on_demand=sweeps_on_demand)
            or "oom_sweep" in item.fixturenames
        ):
            return "not sought: it is swept, and a sweep reports while it runs"
        if "subtests" in item.fixturenames:
            return "not sought: the fixture subtests reports while the test runs"
        return ""


class _Parts:
    """The subtests of a ``unittest`` test; in a trial their failures are not reported."""

    def __init__(self, item: Any) -> None:
        self._item = item if hasattr(item, "addSubTest") else None
        self.has_failed = False

    def __enter__(self) -> None:
        if self._item is not None:
            # pytest's item is the result object to which unittest reports subTest blocks.
            self._item.addSubTest = self._take

    def __exit__(self, *_error: object) -> None:
        if self._item is not None:
            del self._item.addSubTest

    def _take(self, _case: object, _part: object, error: object) -> None:
        self.has_failed = self.has_failed or error is not None
