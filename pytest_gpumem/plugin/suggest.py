"""``--gpu-suggest`` and ``--gpu-find-budget``: the limits that a suite lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_gpumem.plugin.marks import (
    LIMIT_PROPERTY,
    SMALLEST_NOTE_PROPERTY,
    SMALLEST_PROPERTY,
)

if TYPE_CHECKING:
    import pytest

    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.suggestions.limits import Peak


class Suggestions:
    """Takes in every test's peak and suggests limits at the end of the run.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self._suggests: Final = run.settings.suggest
        self._peaks: Final[dict[str, Peak]] = {}
        self._failed: Final[set[str]] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in a test's peak once it is over."""
        if report.failed:
            self._failed.add(report.nodeid)
        if report.when != "teardown" or not report.user_properties:
            return
        from pytest_gpumem.records.memory import from_properties  # noqa: PLC0415  # there are figures
        from pytest_gpumem.suggestions.limits import Peak  # noqa: PLC0415  # likewise

        properties = dict(report.user_properties)
        figures = from_properties(properties)
        calls = [each for (phase, _index), each in figures.items() if phase == "call"]
        if not calls:
            return
        limit = properties.get(LIMIT_PROPERTY)
        smallest = properties.get(SMALLEST_PROPERTY)
        self._peaks[report.nodeid] = Peak(
            test=report.nodeid,
            allocated_bytes=max(each.peak_allocated_bytes for each in calls),
            reserved_bytes=max(each.peak_reserved_bytes for each in figures.values()),
            limit_bytes=None if limit is None else int(str(limit)),
            smallest_budget=None if smallest is None else int(str(smallest)),
            budget_note=str(properties.get(SMALLEST_NOTE_PROPERTY, "")),
        )

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Print the suggestions."""
        passed = {t: p for t, p in self._peaks.items() if t not in self._failed}
        if not passed:
            return
        from pytest_gpumem.suggestions.limits import budgets, explain  # noqa: PLC0415  # there are peaks

        lines = explain(passed) if self._suggests else budgets(passed)
        if lines:
            title = "suggested limits on" if self._suggests else "smallest budgets of"
            terminalreporter.section(f"{title} GPU memory")
            for line in lines:
                terminalreporter.write_line(line)
