"""Keeps, in pytest's cache, the names of tests that used no card in earlier runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pytest

    from pytest_gpumem.plugin.record_keeping import Collector

#: The key in pytest's cache of the names of tests that passed and used no card.
_KEY: Final = "gpumem/idle"


class CardlessTests:
    """Reads and writes the names of tests that use no card; not used in workers.

    Args:
        config: The run's config; without pytest's cache nothing is read or written.
        collector: Collects the tests of this run.
    """

    def __init__(self, config: pytest.Config, collector: Collector) -> None:
        self._cache: Final[Any] = getattr(config, "cache", None)
        self._collector: Final = collector

    @property
    def idle(self) -> set[str]:
        """The tests that used no card in their last run."""
        kept = self._cache.get(_KEY, []) if self._cache is not None else []
        return set(map(str, kept)) if isinstance(kept, list) else set()

    def pytest_sessionfinish(self) -> None:
        """Write the names for later runs."""
        if self._cache is None:
            return
        before, used = self.idle, self._collector.records.keys()
        passed = [
            name
            for name, outcome in self._collector.outcomes.items()
            if outcome == "passed"
        ]
        idle = (before | set(passed)) - used
        if idle != before:
            self._cache.set(_KEY, sorted(idle))
