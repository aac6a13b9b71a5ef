"""Which tests used no card in earlier runs; kept in pytest's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.plugin.marks import has_figures

if TYPE_CHECKING:
    import pytest

#: Where pytest's cache keeps the names of tests that passed and used no card.
_KEY: Final = "gpumem/idle"


class History:
    """Reads and notes which tests use no card; not in workers.

    Args:
        config: The run's; without a cache nothing is known and nothing kept.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._cache: Final[Any] = getattr(config, "cache", None)
        self._used: Final[set[str]] = set()
        self._idle_now: Final[set[str]] = set()
        self._not_passed: Final[set[str]] = set()

    @property
    def idle(self) -> set[str]:
        """Tests that used no card in the last run that had them."""
        kept = self._cache.get(_KEY, []) if self._cache is not None else []
        return set(map(str, kept)) if isinstance(kept, list) else set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note whether a test that passed used a card."""
        if not report.passed:
            self._not_passed.add(report.nodeid)
        if report.when != "teardown":
            return
        if has_figures(report.user_properties):
            self._used.add(report.nodeid)
        elif report.nodeid not in self._not_passed:
            self._idle_now.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Keep it for later runs."""
        if self._cache is None:
            return
        before = self.idle
        idle = (before | self._idle_now) - self._used
        if idle != before:
            self._cache.set(_KEY, sorted(idle))
