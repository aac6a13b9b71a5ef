"""Writes the run's reports at its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.errors import ReportError
from pytest_gpumem.files import write_atomically
from pytest_gpumem.plugin.outputs import STEP_SUMMARY
from pytest_gpumem.plugin.settings import OPTIONS
from pytest_gpumem.plugin.workers import notes_of
from pytest_gpumem.records.codec import decode
from pytest_gpumem.records.run_record import BaselineOutcome, Environment

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from pytest_gpumem.plugin.record_keeping import Collector
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.reports.document import Report

#: Options that only choose the files that a run writes, or the points of a sweep.
_OUTPUTS: Final = {
    "--gpu-report",
    "--gpu-snapshots",
    "--gpu-suggest",
    "--gpu-update-baseline",
    "--gpu-oom-resume",
    "--gpu-replay-oom",
}


class Reporting:
    """Writes the reports; not used in workers.

    Args:
        run: The run.
        config: The run's config.
        collector: Collects the records.

    Raises:
        pytest.UsageError: An HTML page is wanted, but cannot be made.
    """

    def __init__(self, run: Run, config: pytest.Config, collector: Collector) -> None:
        self._run: Final = run
        self._config: Final = config
        base = Path(config.invocation_params.dir)
        self._files: Final = [
            (kind, base / path) for kind, path in run.settings.reports
        ]
        if any(kind == "html" for kind, _ in self._files):
            _check_pages()
        self._tests: Final = collector.records
        self._machines: Final[list[Environment]] = []
        self._lines: list[tuple[str, bool]] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Note a worker's machine; a crashed worker does not send it."""
        told = notes_of(node).get("machine")
        machine = None if told is None else decode(Environment, told)
        if machine is not None and machine not in self._machines:
            self._machines.append(machine)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self) -> Generator[None, object, object]:
        """Write the reports, after the comparison with the baseline."""
        result = yield
        self._write()
        return result

    def _write(self) -> None:
        endings = self._run.endings
        if endings is None or not endings.has_run:
            return  # tests were only listed, so the reports of an earlier run stay
        if not self._files and not self._tests:
            return
        from pytest_gpumem.reports.document import Report, by_name

        report = Report(
            (self._run.describe(),),
            tuple(self._machines) or (machine_of(self._run),),
            self._baseline(),
            by_name(self._tests.values()),
            outcomes=_outcomes(self._config),
        )
        for kind, path in self._files:
            try:
                write_atomically(path, render(kind, report, self._options()))
            except OSError as error:
                endings.fail(f"--gpu-report: {path} cannot be written: {error}")
                continue
            self._lines.append((f"{kind} report: {os.path.relpath(path)}", False))
        summary = os.environ.get(STEP_SUMMARY)
        if summary and self._tests:
            try:
                with Path(summary).open("a", encoding="utf-8") as file:
                    file.writelines(render("md", report))
            except OSError as error:
                text = f"{STEP_SUMMARY}: {summary} cannot be written: {error}"
                self._lines.append((text, True))

    def _options(self) -> list[str]:
        """Return the options that change what tests see, as on the command line."""
        found = []
        for each in OPTIONS:
            line = getattr(self._config.option, each.ini, None)
            given = self._config.getini(each.ini) if line is None else line
            if each.flag in _OUTPUTS or given in (None, "", False):
                continue
            texts = given if isinstance(given, list) else [given]
            found += [each.flag if each.is_flag else f"{each.flag}={t}" for t in texts]
        return found

    def _baseline(self) -> BaselineOutcome | None:
        plugin: Any = self._config.pluginmanager.get_plugin("gpumem-baseline")
        if plugin is None or self._run.gate is None:
            return None
        return BaselineOutcome(
            self._run.gate.name, plugin.changes, plugin.new, plugin.stale
        )

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Print which files were written."""
        for line, is_warning in self._lines:
            terminalreporter.write_line(line, yellow=is_warning)


def _outcomes(config: pytest.Config) -> dict[str, int]:
    """Return how many tests ended in each way, as pytest's last line has them."""
    terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
    stats: dict[str, list[Any]] = {} if terminal is None else terminal.stats
    found = {
        name: sum(getattr(each, "count_towards_summary", True) for each in reports)
        for name, reports in stats.items()
        if name not in ("", "warnings")
    }
    return {name: count for name, count in found.items() if count}


def machine_of(run: Run) -> Environment:
    """Return the machine and the cards of a run."""
    from pytest_gpumem.devices.environment import facts_of

    return facts_of(run.device, run.choice.kind)


def render(kind: str, report: Report, options: Sequence[str] = ()) -> Iterator[str]:
    """Return a report's text, piece by piece.

    Args:
        kind: One of ``REPORTS``.
        report: The run.
        options: The run's options, for a report with commands that repeat failures.
    """
    if kind == "issue":
        from pytest_gpumem.reports.reproduction import reproduction

        return iter((reproduction(report, options),))
    if kind == "json":
        from pytest_gpumem.reports.document import to_chunks

        return to_chunks(report)
    if kind == "md":
        from pytest_gpumem.reports.markdown import markdown

        return iter((markdown(report),))
    from pytest_gpumem.reports.page import page

    return page(report)


def _check_pages() -> None:
    """Reject an HTML page that cannot be made, before any test runs.

    Raises:
        pytest.UsageError: It cannot be made.
    """
    from pytest_gpumem.reports.page import check_available

    try:
        check_available()
    except ReportError as error:
        raise pytest.UsageError(f"--gpu-report: {error}") from None
