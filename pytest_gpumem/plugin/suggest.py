"""``--gpu-suggest``: the limits that a suite lacks, printed or as a patch."""

from __future__ import annotations

import os
import time
from pathlib import Path
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
        config: The run's.
    """

    def __init__(self, run: Run, config: pytest.Config) -> None:
        settings = run.settings
        self._run: Final = run
        self._suggests: Final = settings.suggest is not None
        self._file: Final = (
            Path(config.invocation_params.dir) / settings.suggest
            if settings.suggest not in (None, "print")
            else None
        )
        self._root: Final = config.rootpath
        self._started_s: Final = time.time()
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
        """Print the suggestions, and write the patch."""
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
        if self._file is not None:
            for line in self._write(passed):
                terminalreporter.write_line(line)

    def _write(self, passed: dict[str, Peak]) -> list[str]:
        from pytest_gpumem.files import write_atomically  # noqa: PLC0415  # a patch is wanted
        from pytest_gpumem.suggestions.limits import missing, size_text  # noqa: PLC0415  # likewise
        from pytest_gpumem.suggestions.patch import make_patch  # noqa: PLC0415  # likewise

        assert self._file is not None, "the caller looks"  # noqa: S101  # states why
        markers = {
            test: f'max_vram("{size_text(limit)}")'
            for test, limit in missing(passed.values()).items()
        }
        patch = make_patch(self._root, markers, self._started_s)
        lines = [f"{test} is left to you: {why}" for test, why in patch.left.items()]
        name = os.path.relpath(self._file)
        if not patch.text:
            return [*lines, f"{name} was not written: there is nothing to add"]
        try:
            write_atomically(self._file, patch.text)
        except OSError as error:
            text = f"--gpu-suggest: {name} cannot be written: {error}"
            if self._run.endings is not None:
                self._run.endings.fail(f"{text}; name another file")
            return lines
        lines.append(f"{name} written; apply it in {self._root}: patch -p1 < {name}")
        return lines
