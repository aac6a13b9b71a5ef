"""Shows the progress of a long sweep on the terminal."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    import pytest

#: Seconds between two lines about the same sweep, on a terminal and in a file.
EVERY_S: Final = {True: 5.0, False: 30.0}


class Progress(NamedTuple):
    """The progress of a sweep.

    Attributes:
        nodeid: The test that is swept.
        done: The number of finished points.
        total: The number of all points.
        failing: The number of finished points that ended badly.
    """

    nodeid: str
    done: int
    total: int
    failing: int

    def __str__(self) -> str:
        failing = f", {self.failing} failing" if self.failing else ""
        return f"{self.nodeid}: {self.done} of {self.total} points{failing}"


class SweepProgress:
    """Prints the progress of each sweep from time to time, here or in workers.

    Args:
        config: The run's config; the lines go to its terminal.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config: Final = config
        self._shown_s: Final[dict[str, float]] = {}

    def take(self, values: list[Any]) -> None:
        """Show the progress that came with the report of a point."""
        self.show(Progress(*values))

    def show(self, progress: Progress) -> None:
        """Print a line, unless the sweep has just begun or the last line is recent."""
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or self._config.get_verbosity() < 0:
            return
        now_s = time.monotonic()
        since_s = now_s - self._shown_s.setdefault(progress.nodeid, now_s)
        if since_s < EVERY_S[bool(terminal.isatty)] or progress.done == progress.total:
            return
        self._shown_s[progress.nodeid] = now_s
        terminal.ensure_newline()
        terminal.write_line(str(progress))


def show_progress(config: pytest.Config, progress: Progress) -> None:
    """Show the progress of a sweep where points have no reports (before pytest 9)."""
    summary = config.pluginmanager.get_plugin("gpumem-summary")
    if summary is None:
        return  # a worker of pytest-xdist, which has no terminal
    capture = config.pluginmanager.get_plugin("capturemanager")
    pause = nullcontext() if capture is None else capture.global_and_fixture_disabled()
    with pause:
        summary.sweep_progress.show(progress)
