"""The terminal's table of peaks, from the reports of tests run here or in workers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.guards import take_dropped
from pytest_gpumem.plugin.marks import (
    FALLBACK_PROPERTY,
    PROGRESS_PROPERTY,
    SWEEP_PROPERTY,
    UNKNOWN_PROPERTY,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.plugin.phases import Phases
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.plugin.sweep_progress import SweepProgress
    from pytest_gpumem.reports.terminal import Row

#: The key of observers that were dropped, in a worker's output.
WORKER_OUTPUT: Final = "gpumem_dropped"
#: Where a worker tells how many allocations each rule of the run failed.
RULES_OUTPUT: Final = "gpumem_rules"
#: Sites of a sweep that are listed without ``-v``.
SITES: Final = 10


class SummaryPlugin:
    """Collects figures from reports and prints them at the end.

    Args:
        run: The run.
        hooks: Its hooks, for what they know of its rules.
        config: pytest's.
    """

    def __init__(self, run: Run, hooks: Phases, config: pytest.Config) -> None:
        self._run = run
        self._hooks = hooks
        self._config = config
        self._progress: SweepProgress | None = None
        self._rows: list[Row] = []
        self._fallbacks: list[tuple[str, list[dict[str, Any]]]] = []
        self._sweeps: list[dict[str, Any]] = []
        self._unknown: dict[str, None] = {}
        self._dropped: dict[str, None] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take in which of a worker's observers failed; one that crashed tells none."""
        output = getattr(node, "workeroutput", {})
        self._dropped |= dict.fromkeys(output.get(WORKER_OUTPUT, ()))
        for rule, count in output.get(RULES_OUTPUT, {}).items():
            self._hooks.rule_counts[rule] += count

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the figures in once a test is over, and the progress of sweeps before."""
        if report.when == "call":
            for name, value in report.user_properties:
                if name == PROGRESS_PROPERTY:
                    self.sweep_progress.take(str(value))
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
        self._unknown |= {
            str(value): None
            for name, value in report.user_properties
            if name == UNKNOWN_PROPERTY
        }
        from pytest_gpumem.records.memory import from_properties  # noqa: PLC0415  # there are figures
        from pytest_gpumem.reports.terminal import Row  # noqa: PLC0415  # likewise

        figures = from_properties(dict(report.user_properties))
        self._rows.extend(
            Row(report.nodeid, phase, each) for (phase, _index), each in figures.items()
        )

    @property
    def sweep_progress(self) -> SweepProgress:
        """What shows how far sweeps are."""
        if self._progress is None:
            from pytest_gpumem.plugin.sweep_progress import SweepProgress  # noqa: PLC0415  # there is a sweep

            self._progress = SweepProgress(self._config)
        return self._progress

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        """Print the table, and rules that were never reached."""
        verbosity = config.get_verbosity()
        if verbosity >= 0:
            self._show_peaks(terminalreporter, detailed=verbosity > 0)
            self._show_fallbacks(terminalreporter)
            self._show_sweeps(terminalreporter, detailed=verbosity > 0)
        for text in (*self._dropped, *take_dropped()):
            terminalreporter.write_line(f"gpumem: {text}", yellow=True)
        for text in self._unknown:
            terminalreporter.write_line(text, yellow=True)
        endings = self._run.endings
        if endings is not None and endings.has_run:
            for text in self._inert():
                endings.is_inert(text)

    def _inert(self) -> Iterator[str]:
        """Yield what was asked for and held or failed nothing."""
        settings, choice = self._run.settings, self._run.choice
        if choice.kind == "off":
            asked = {
                "--gpu-budget": settings.budgets,
                "--gpu-max-vram": settings.max_vram is not None,
                "--gpu-leak-check": settings.leak_check,
                "--gpu-inject-oom": settings.rules,
                "--gpu-oom-sweep": settings.oom_sweep,
                "--gpu-replay-oom": settings.replay is not None,
            }
            names = [name for name, is_asked in asked.items() if is_asked]
            if names:
                yield (
                    f"{', '.join(names)}: nothing was held to it, as the backend is "
                    f"off ({choice.reason}); run with --gpu-backend=simulated or cuda"
                )
            return
        for rule, count in self._hooks.rule_counts.items():
            if not count:
                yield f"--gpu-inject-oom={rule} was never reached"
        if settings.replay is not None and not self._sweeps:
            yield (
                f"--gpu-replay-oom={settings.replay}: nothing was replayed, as no "
                "test that is swept ran; name the test as well, as the line does that "
                "a failing point prints"
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
        from pytest_gpumem.records.staircase import staircase_table  # noqa: PLC0415  # there is one

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
        from pytest_gpumem.sweeps.summary import SweepSummary  # noqa: PLC0415  # there was a sweep
        from pytest_gpumem.sweeps.text import coverage_table, summarise  # noqa: PLC0415  # likewise

        terminal.section("OOM sweeps")
        for (nodeid, _name), summary in SweepSummary.whole(self._sweeps).items():
            terminal.write_line(
                f"{nodeid}: {summarise(summary)}", red=summary.num_failures > 0
            )
            table = coverage_table(summary, most=None if detailed else SITES)
            for line in table.splitlines():
                terminal.write_line(f"  {line}")


class DroppedNote:
    """Tells the controller which observers of a worker failed, and what rules did.

    Args:
        hooks: The worker's hooks, for what they know of its rules.
    """

    def __init__(self, hooks: Phases) -> None:
        self._hooks: Final = hooks

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Note them in the worker's output."""
        output: dict[str, Any] = session.config.workeroutput  # type: ignore[attr-defined]  # xdist's
        output[WORKER_OUTPUT] = take_dropped()
        output[RULES_OUTPUT] = self._hooks.rule_counts
