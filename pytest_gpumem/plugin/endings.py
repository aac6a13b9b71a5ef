"""Collects reasons, other than failed tests, for which a run's exit code is not 0.

There are two kinds. A file that could not be written fails the run. A requested check may
have had nothing to check, such as a baseline without figures of this card, or a replay
with nothing to replay. It fails the run under ``--gpu-strict``, which is on in CI.
Otherwise the run prints the reason in a section below the failures.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

PLUGIN_NAME: Final = "gpumem-endings"
#: Exit codes of runs in which nothing went wrong so far.
_FINE: Final = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


class Endings:
    """Collects the reasons for which the run fails; not used in workers.

    Args:
        is_strict: Whether a check that checks nothing fails the run.
    """

    def __init__(self, *, is_strict: bool) -> None:
        self._is_strict: Final = is_strict
        self._failures: Final[dict[str, None]] = {}
        self._inert: Final[dict[str, None]] = {}
        self._is_shown = False
        #: Whether tests run; if they are only listed, no file is written.
        self.has_run = False

    def fail(self, text: str) -> None:
        """Fail the run, with the reason."""
        self._failures[text] = None

    def is_inert(self, text: str) -> None:
        """Note that a check had nothing to check, with advice on how to change that."""
        self._inert[text] = None

    @property
    def has_failed(self) -> bool:
        """Whether the run is to end with a non-zero exit code."""
        return bool(self._failures or (self._is_strict and self._inert))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Note whether tests run: with --collect-only or --setup-plan they do not."""
        option = session.config.option
        self.has_run = not any(
            getattr(option, name, False)
            for name in ("collectonly", "setupplan", "setuponly")
        )

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(
        self, session: pytest.Session
    ) -> Generator[None, object, object]:
        """Choose the exit code when all plugins have given their reasons."""
        result = yield
        if self.has_failed and session.exitstatus in _FINE:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if not self._is_shown:  # --no-summary, or no terminal plugin
            for text in (*self._failures, *self._inert):
                sys.stderr.write(f"gpumem: {text}\n")
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> Generator[None, object, object]:
        """Print the reasons below everything else."""
        result = yield
        self._is_shown = True
        self._show(terminalreporter)
        return result

    def _show(self, terminal: pytest.TerminalReporter) -> None:
        if not self._failures and not self._inert:
            return
        red = self.has_failed
        title = "GPU memory: not everything that was requested was done"
        terminal.section(title, red=red, yellow=not red)
        for text in self._failures:
            terminal.write_line(text, red=True)
        for text in self._inert:
            terminal.write_line(text, red=red, yellow=not red)
        if self._inert:
            terminal.write_line(
                "this fails the run, as --gpu-strict or CI says (gpu_strict = false "
                "in the ini file lets it pass)"
                if self._is_strict
                else "in CI, or with --gpu-strict, this fails the run"
            )
        if self.has_failed:
            # The last line counts these reasons, because a green line would be overlooked.
            wrong: list[Any] = terminal.stats.setdefault("error", [])
            count = len(self._failures) + len(self._inert) * self._is_strict
            wrong.extend(_Counted() for _ in range(count))


class _Counted:
    """A failure of the run, for the counts of the last line."""

    count_towards_summary = True
