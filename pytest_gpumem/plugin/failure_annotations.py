"""Shows failed tests as annotations of a pull request, in runs of GitHub Actions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.reports.github_commands import (
    SourceLine,
    error_command,
    source_line_of,
)

if TYPE_CHECKING:
    from pytest_gpumem.plugin.record_keeping import Finished

#: The environment variable with the folder of the checkout.
WORKSPACE: Final = "GITHUB_WORKSPACE"


class Annotations:
    """Collects tests that failed for their memory; prints them when the run is over.

    It is used in the process that prints the summary, so each test is printed once, also
    with several workers.

    Args:
        config: The run's config.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._root: Final = config.rootpath
        self._start: Final = Path(config.invocation_params.dir)
        workspace = os.environ.get(WORKSPACE)
        self._workspace: Final = Path(workspace) if workspace else self._root
        self._commands: Final[list[str]] = []

    def take(self, test: Finished) -> None:
        """Note a test that failed for its memory."""
        record = test.record
        if test.failure is None or record is None:
            return
        reason = record.broken_limit or record.incident
        if not (reason or record.sweeps or record.fallbacks):
            return
        text = reason or _first_line(test.failure)
        failed_at = self._source_line(test.failure)
        self._add(f"{test.nodeid}: {text}", failed_at, "GPU memory")
        line = source_line_of(record.site or "", (self._start, self._root))
        if line is not None and line != failed_at:
            self._add(
                f"{test.nodeid}: {text}\nat {record.site}",
                line,
                "GPU memory: allocated here",
            )

    def _add(self, message: str, line: SourceLine | None, title: str) -> None:
        self._commands.append(
            error_command(message, title=title, source_line=line, root=self._workspace)
        )

    def _source_line(self, report: pytest.TestReport) -> SourceLine | None:
        file, line, _name = report.location
        return None if line is None else SourceLine(self._root / file, line + 1)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Print the annotations, each at the beginning of a line, which GitHub requires."""
        terminalreporter.ensure_newline()
        for command in self._commands:
            terminalreporter.write_line(command)


def _first_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext if crash is None else str(crash.message)
    return text.strip().partition("\n")[0]
