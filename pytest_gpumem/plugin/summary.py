"""The terminal's table of peaks, from the reports of tests run here or in workers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pytest_gpumem.plugin.marks import FALLBACK_PROPERTY, SWEEP_PROPERTY

if TYPE_CHECKING:
    import pytest

    from pytest_gpumem.plugin.phases import Phases
    from pytest_gpumem.reports.terminal import Row


class SummaryPlugin:
    """Collects figures from reports and prints them at the end.

    Args:
        hooks: The run's hooks, for what they know of its rules.
    """

    def __init__(self, hooks: Phases) -> None:
        self._hooks = hooks
        self._rows: list[Row] = []
        self._fallbacks: list[tuple[str, list[dict[str, Any]]]] = []
        self._sweeps: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the figures in once a test is over."""
        if report.when != "teardown" or not report.user_properties:
            return
        self._fallbacks += [
            (report.nodeid, json.loads(str(value)))
            for name, value in report.user_properties
            if name == FALLBACK_PROPERTY
        ]
        self._sweeps += [
            json.loads(str(value))
            for name, value in report.user_properties
            if name == SWEEP_PROPERTY
        ]
        from pytest_gpumem.model.records import from_properties  # noqa: PLC0415  # there are figures
        from pytest_gpumem.reports.terminal import Row  # noqa: PLC0415  # likewise

        figures = from_properties(dict(report.user_properties))
        self._rows.extend(
            Row(report.nodeid, phase, each) for (phase, _index), each in figures.items()
        )

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        """Print the table, and rules that were never reached."""
        verbosity = config.get_verbosity()
        if verbosity >= 0:
            self._show_peaks(terminalreporter, detailed=verbosity > 0)
            self._show_fallbacks(terminalreporter)
            self._show_sweeps(terminalreporter, detailed=verbosity > 0)
        for rule, count in self._hooks.rule_counts.items():
            if not count:
                terminalreporter.write_line(
                    f"--gpu-inject-oom={rule} was never reached", yellow=True
                )

    def _show_peaks(self, terminal: pytest.TerminalReporter, *, detailed: bool) -> None:
        if not self._rows:
            return
        from pytest_gpumem.reports.terminal import table  # noqa: PLC0415  # there are figures

        terminal.section("GPU memory")
        for line in table(self._rows, detailed=detailed):
            terminal.write_line(line)

    def _show_fallbacks(self, terminal: pytest.TerminalReporter) -> None:
        if not self._fallbacks:
            return
        from pytest_gpumem.model.staircase import staircase_table  # noqa: PLC0415  # there is one

        terminal.section("fallbacks")
        for nodeid, steps in self._fallbacks:
            terminal.write_line(nodeid)
            for line in staircase_table(steps).splitlines():
                terminal.write_line(f"  {line}")

    def _show_sweeps(
        self, terminal: pytest.TerminalReporter, *, detailed: bool
    ) -> None:
        if not self._sweeps:
            return
        from pytest_gpumem.model.sweep_text import coverage_table, summarise  # noqa: PLC0415  # likewise

        terminal.section("OOM sweeps")
        for sweep in self._sweeps:
            terminal.write_line(
                f"{sweep['nodeid']}: {summarise(sweep)}", red=sweep["num_failures"] > 0
            )
            for line in coverage_table(sweep).splitlines() if detailed else ():
                terminal.write_line(f"  {line}")
