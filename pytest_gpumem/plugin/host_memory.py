"""Measures the host's memory in each test, and enforces the test's host budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.host_memory import ResidentPeak, anonymous_bytes
from pytest_gpumem.plugin.record_keeping import has_record, record_of
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_gpumem.instruments.host_budget import HostBudget
    from pytest_gpumem.plugin import marks
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.records.record import LimitOutcome

_UNKNOWN: Final = (
    "host bytes unknown: this system has no /proc; host budgets limit plans alone"
)


class HostMemory:
    """The hooks around the phases of each test; they enclose the hooks for the cards.

    Args:
        run: The run.
        markers: The arguments of each test's markers.
    """

    def __init__(self, run: Run, markers: marks.MarkersByTest) -> None:
        self._run: Final = run
        self._markers: Final = markers
        self._peak: ResidentPeak | None = None
        self._wanted: int | None = None
        self._budget: HostBudget | None = None
        self._outcome: LimitOutcome | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        """Begin to measure a test, and set its host budget."""
        self._end()
        self._peak = ResidentPeak()
        nbytes = self._markers[item].host_budget
        self._wanted = self._run.settings.host_budget if nbytes is None else nbytes
        if self._run.device is not None:
            self.device_came()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        """Fail a test whose call added more than its budget."""
        if self._budget is not None:
            self._budget.rebase()
        try:
            result = yield
        finally:
            outcome = self._outcome = self._judge()
        if outcome is not None and not outcome.held:
            from pytest_gpumem.plugin.limits import fail

            added, nbytes = outcome.measured_bytes, outcome.limit_bytes
            fail(
                item,
                f"host memory above the host budget: the test added "
                f"{format_size(added)} ({added} bytes) to it, budget "
                f"{format_size(nbytes)} ({nbytes} bytes), "
                f"{format_size(added - nbytes)} too much\n"
                "give part of the model to the disk (device_map='auto' with "
                "offload_folder), or raise --gpu-host-budget or the marker's host=",
            )
        return result

    def _judge(self) -> LimitOutcome | None:
        """Return the call's budget and its added bytes; None if one is not known."""
        budget = self._budget
        if budget is None or not anonymous_bytes():
            return None
        from pytest_gpumem.records.record import LimitOutcome

        budget.sample()
        added = budget.most_added
        held = added <= budget.nbytes
        return LimitOutcome("host", None, "call", budget.nbytes, added, held)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        """Put the figures into the test's record, if it used a card."""
        try:
            return (yield)
        finally:
            if has_record(item):
                record = record_of(item)
                peak = self._peak
                record.peak_host_bytes = None if peak is None else peak.read()
                if self._outcome is not None:
                    record.limits.append(self._outcome)
                elif self._budget is not None and not anonymous_bytes():
                    record.unknown = "; ".join(filter(None, (record.unknown, _UNKNOWN)))
            self._end()

    def device_came(self) -> None:
        """Set the running test's host budget, once torch is there.

        The bytes that the import itself adds do not count.
        """
        if self._wanted is not None and self._budget is None:
            from pytest_gpumem.instruments.host_budget import HostBudget

            budget = HostBudget(self._wanted, own_bytes=self._own_bytes)
            self._budget = budget.__enter__()

    def _own_bytes(self) -> int:
        """Return this process's own bytes, without the values of a simulated card."""
        device = self._run.device
        if device is not None and device.kind == "simulated":
            nbytes: int = device.machine.host_bytes()  # type: ignore[attr-defined]  # the device is simulated here
            return nbytes
        return anonymous_bytes()

    def _end(self) -> None:
        budget, self._budget = self._budget, None
        self._peak = self._wanted = self._outcome = None
        if budget is not None:
            budget.close()

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        """End the budget of a test that was interrupted."""
        self._end()
