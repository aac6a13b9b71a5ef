"""Prints the summary of a run from the records of its tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.guards import take_dropped
from pytest_gpumem.plugin.workers import notes_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_gpumem.plugin.phases import Phases
    from pytest_gpumem.plugin.record_keeping import Collector
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.plugin.sweep_progress import SweepProgress
    from pytest_gpumem.records.record import Record

#: The most sites of a sweep that are listed without ``-v``.
SITES: Final = 10


def notes(hooks: Phases) -> dict[str, Callable[[], Any]]:
    """Return a worker's notes: the observers that failed, and the counts of rules."""
    return {"dropped": take_dropped, "rules": lambda: hooks.rule_counts}


class SummaryPlugin:
    """Prints the tests' figures and the results of checks at the end of the run.

    Args:
        run: The run.
        hooks: The hooks around tests; they count the allocations that rules made fail.
        config: The run's config.
        collector: Collects the records.
    """

    def __init__(
        self, run: Run, hooks: Phases, config: pytest.Config, collector: Collector
    ) -> None:
        self._run = run
        self._hooks = hooks
        self._config = config
        self._progress: SweepProgress | None = None
        self._tests: Final[Mapping[str, Record]] = collector.records
        self._failed: Final = collector.failed
        self._dropped: dict[str, None] = {}
        collector.on_progress = self._take_progress

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Read a worker's notes; a worker that crashed has none."""
        told = notes_of(node)
        self._dropped |= dict.fromkeys(told.get("dropped", ()))
        for rule, count in told.get("rules", {}).items():
            self._hooks.rule_counts[rule] += count

    def _take_progress(self, values: list[Any]) -> None:
        self.sweep_progress.take(values)

    @property
    def sweep_progress(self) -> SweepProgress:
        """The object that shows the progress of sweeps."""
        if self._progress is None:
            from pytest_gpumem.plugin.sweep_progress import SweepProgress

            self._progress = SweepProgress(self._config)
        return self._progress

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, config: pytest.Config
    ) -> None:
        """Print the tables, and rules that were never reached."""
        verbosity = config.get_verbosity()
        if verbosity >= 0 and self._tests:
            self._show_peaks(terminalreporter, detailed=verbosity > 0)
            self._show_fallbacks(terminalreporter)
            self._show_sweeps(terminalreporter, detailed=verbosity > 0)
        for text in (*self._dropped, *take_dropped()):
            terminalreporter.write_line(f"gpumem: {text}", yellow=True)
        for name, test in self._tests.items():
            for batch in test.shrunk_batches:
                terminalreporter.write_line(
                    f"{name}: the batch of {batch.function} was shrunk from "
                    f"{batch.first} to {batch.last}, as memory ran out"
                )
        unknown = [each.unknown for each in self._tests.values() if each.unknown]
        for text in dict.fromkeys(unknown):
            terminalreporter.write_line(text, yellow=True)
        endings = self._run.endings
        if endings is not None and endings.has_run:
            for text in self._inert():
                endings.is_inert(text)
        self._show_limits(terminalreporter)
        self._show_sharing(terminalreporter)

    def _inert(self) -> Iterator[str]:
        """Yield a line for each option that was given and had no effect."""
        settings, choice = self._run.settings, self._run.choice
        if choice.kind == "off":
            asked = {
                "--gpu-budget": settings.budgets,
                "--gpu-host-budget": settings.host_budget is not None,
                "--gpu-max-vram": settings.max_vram is not None,
                "--gpu-leak-check": settings.leak_check,
                "--gpu-inject-oom": settings.rules,
                "--gpu-oom-sweep": settings.oom_sweep is not None,
                "--gpu-replay-oom": settings.replay is not None,
            }
            names = [name for name, is_asked in asked.items() if is_asked]
            if names:
                yield (
                    f"{', '.join(names)}: it had no effect, because the backend is "
                    f"off ({choice.reason}); run with --gpu-backend=simulated or cuda"
                )
            return
        for rule, count in self._hooks.rule_counts.items():
            if not count:
                yield f"--gpu-inject-oom={rule} was never reached"
        has_swept = any(each.sweeps for each in self._tests.values())
        if settings.replay is not None and not has_swept:
            yield (
                f"--gpu-replay-oom={settings.replay}: nothing was replayed, as no "
                "test that is swept ran; name the test as well, as the line does that "
                "a failing point prints"
            )

    def _show_peaks(self, terminal: pytest.TerminalReporter, *, detailed: bool) -> None:
        from pytest_gpumem.reports.terminal import peak_table

        lines = peak_table(self._tests.values(), detailed=detailed)
        if lines:
            terminal.section("GPU memory")
        for line in lines:
            terminal.write_line(line)

    def _show_fallbacks(self, terminal: pytest.TerminalReporter) -> None:
        checked = [each for each in self._tests.values() if each.fallbacks]
        if not checked:
            return
        from pytest_gpumem.records.staircase import staircase_table

        terminal.section("fallbacks")
        for test in checked:
            for steps in test.fallbacks:
                terminal.write_line(test.nodeid)
                for line in staircase_table(steps).splitlines():
                    terminal.write_line(f"  {line}")

    def _show_sweeps(
        self, terminal: pytest.TerminalReporter, *, detailed: bool
    ) -> None:
        sweeps = [each for test in self._tests.values() for each in test.sweeps]
        if not sweeps:
            return
        from pytest_gpumem.sweeps.sweep_record import whole_sweeps
        from pytest_gpumem.sweeps.text import coverage_table, summarise

        terminal.section("OOM sweeps")
        for sweep in whole_sweeps(sweeps):
            terminal.write_line(
                f"{sweep.nodeid}: {summarise(sweep)}", red=sweep.failures > 0
            )
            table = coverage_table(sweep, most=None if detailed else SITES)
            for line in table.splitlines():
                terminal.write_line(f"  {line}")

    def _show_limits(self, terminal: pytest.TerminalReporter) -> None:
        """Print suggested limits and smallest budgets, if an option requests them."""
        suggests = self._run.settings.suggests_limits
        if not suggests and not self._run.settings.finds_budgets:
            return
        from pytest_gpumem.reports.suggestions import (
            budget_lines,
            suggestion_lines,
        )

        passed = [
            each
            for name, each in self._tests.items()
            if name not in self._failed and each.of_phase("call")
        ]
        lines = suggestion_lines(passed) if suggests else budget_lines(passed)
        if lines:
            title = "suggested limits on" if suggests else "smallest budgets of"
            terminal.section(f"{title} GPU memory")
        for line in lines:
            terminal.write_line(line)

    def _show_sharing(self, terminal: pytest.TerminalReporter) -> None:
        """Print the total time of waits, and the OOMs that other workers helped to cause."""
        waits = {name: each.waited_s for name, each in self._tests.items()}
        waits = {name: waited_s for name, waited_s in waits.items() if waited_s}
        contended = {
            name: each.contention
            for name, each in self._tests.items()
            if each.contention is not None
        }
        if not waits and not contended:
            return
        from pytest_gpumem.plugin.contention import advice, describe_contention

        terminal.section("shared GPUs")
        if waits:
            longest = max(waits, key=lambda name: waits[name])
            terminal.write_line(
                f"{len(waits)} test(s) waited for their bytes of a card, "
                f"{sum(waits.values()):.1f} s in all; the longest "
                f"{waits[longest]:.1f} s: {longest}"
            )
        for name, seen in contended.items():
            text = f"{name}: {describe_contention(seen)}; {advice(seen)}"
            terminal.write_line(text, yellow=True)
