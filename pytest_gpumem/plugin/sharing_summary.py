"""What sharing cards came to, at the end of a run: retries and waits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pytest_gpumem.plugin.contention import OUTCOME, describe, is_contended
from pytest_gpumem.plugin.marks import CONTENTION_PROPERTY, WAIT_PROPERTY

if TYPE_CHECKING:
    import pytest


class SharingSummary:
    """Shows attempts under contention as such, and sums waits up; not in workers."""

    def __init__(self) -> None:
        self._contended: dict[str, dict[str, Any]] = {}
        self._outcomes: dict[str, str] = {}
        self._waits: dict[str, float] = {}

    def pytest_report_teststatus(
        self, report: pytest.TestReport | pytest.CollectReport
    ) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
        """Show an attempt under contention as such: C, no failure of its own."""
        if not is_contended(report):
            return None
        return OUTCOME, "C", ("CONTENDED", {"yellow": True})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note retries, waits, and how retried tests ended."""
        properties = dict(report.user_properties)
        if is_contended(report):
            told = json.loads(str(properties[CONTENTION_PROPERTY]))
            self._contended[report.nodeid] = told
        elif report.nodeid in self._contended and not report.passed:
            self._outcomes[report.nodeid] = report.outcome
        if WAIT_PROPERTY in properties:
            waited = float(str(properties[WAIT_PROPERTY]))
            self._waits[report.nodeid] = waited

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Print both, where there were any."""
        if not self._contended and not self._waits:
            return
        terminalreporter.section("shared GPUs")
        if self._waits:
            longest = max(self._waits, key=lambda name: self._waits[name])
            terminalreporter.write_line(
                f"{len(self._waits)} test(s) waited for their bytes of a card, "
                f"{sum(self._waits.values()):.1f} s in all; the longest "
                f"{self._waits[longest]:.1f} s: {longest}"
            )
        for nodeid, seen in self._contended.items():
            outcome = self._outcomes.get(nodeid, "passed")
            terminalreporter.write_line(
                f"{nodeid}: {describe(seen)}; retried alone, {outcome}", yellow=True
            )
        if any(seen["share_bytes"] for seen in self._contended.values()):
            terminalreporter.write_line(
                "tests that say what they need wait for it: "
                "@pytest.mark.requires_vram('...')"
            )
