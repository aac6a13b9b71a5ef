"""What sharing cards came to, at the end of a run: waits and OOMs under contention."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pytest_gpumem.plugin.contention import advice, describe
from pytest_gpumem.plugin.marks import CONTENTION_PROPERTY, WAIT_PROPERTY

if TYPE_CHECKING:
    import pytest


class SharingSummary:
    """Sums up waits and OOMs under contention; not in workers."""

    def __init__(self) -> None:
        self._contended: dict[str, dict[str, Any]] = {}
        self._waits: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note waits, and OOMs under contention."""
        properties = dict(report.user_properties)
        if CONTENTION_PROPERTY in properties:
            told = json.loads(str(properties[CONTENTION_PROPERTY]))
            self._contended[report.nodeid] = told
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
            text = f"{nodeid}: {describe(seen)}; {advice(seen)}"
            terminalreporter.write_line(text, yellow=True)
