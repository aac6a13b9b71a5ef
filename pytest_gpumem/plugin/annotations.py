"""Failed tests as annotations of a pull request, in runs of GitHub Actions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from pytest_gpumem.plugin import marks
from pytest_gpumem.reports.annotations import Place, error_command, place_of

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Where the checkout is.
WORKSPACE: Final = "GITHUB_WORKSPACE"
#: A test that fails and has one of these failed for its memory.
_REASONS: Final = (
    marks.BROKEN_PROPERTY,
    marks.INCIDENT_PROPERTY,
    marks.SWEEP_PROPERTY,
    marks.FALLBACK_PROPERTY,
)


class _Failure(NamedTuple):
    """A test that failed: where it is, and the first line of what was raised."""

    place: Place | None
    text: str


class Annotations:
    """Collects tests that failed for their memory; prints them when the run is over.

    It belongs to the process that prints the summary, so each is printed once,
    however many workers there are.

    Args:
        config: The run's.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._root: Final = config.rootpath
        self._start: Final = Path(config.invocation_params.dir)
        workspace = os.environ.get(WORKSPACE)
        self._workspace: Final = Path(workspace) if workspace else self._root
        self._failures: Final[dict[str, _Failure]] = {}
        self._commands: Final[list[str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure; once the test is over, what is known of its memory."""
        if report.failed:
            failure = _Failure(self._place(report), _first_line(report))
            self._failures.setdefault(report.nodeid, failure)
        if report.when == "teardown":
            failed = self._failures.pop(report.nodeid, None)
            if failed is not None:
                self._annotate(report.nodeid, failed, dict(report.user_properties))

    def _annotate(
        self, test: str, failure: _Failure, known: Mapping[str, object]
    ) -> None:
        if not any(name in known for name in _REASONS):
            return
        reasons = (known.get(name) for name in _REASONS[:2])
        text = next((str(each) for each in reasons if each), failure.text)
        self._add(f"{test}: {text}", failure.place, "GPU memory")
        site = known.get(marks.SITE_PROPERTY)
        place = place_of(str(site or ""), (self._start, self._root))
        if place is not None and place != failure.place:
            self._add(f"{test}: {text}\nat {site}", place, "GPU memory: allocated here")

    def _add(self, message: str, place: Place | None, title: str) -> None:
        self._commands.append(
            error_command(message, title=title, place=place, root=self._workspace)
        )

    def _place(self, report: pytest.TestReport) -> Place | None:
        file, line, _name = report.location
        return None if line is None else Place(self._root / file, line + 1)

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Print them, each at the beginning of a line, as GitHub reads them."""
        terminalreporter.ensure_newline()
        for command in self._commands:
            terminalreporter.write_line(command)


def _first_line(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longreprtext if crash is None else str(crash.message)
    return text.strip().partition("\n")[0]
