"""Which tests used a card in earlier runs, and how long they took; in pytest's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.plugin.marks import has_figures

if TYPE_CHECKING:
    import pytest

#: Where pytest's cache keeps it: seconds by test.
_KEY: Final = "gpumem/seconds"
#: Where it keeps the names of tests that passed and used no card.
_IDLE_KEY: Final = "gpumem/idle"


class History:
    """Reads and notes who uses a card, and for how many seconds; not in workers.

    Args:
        config: The run's; without a cache nothing is known and nothing kept.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._cache: Final[Any] = getattr(config, "cache", None)
        self._before: dict[str, float] | None = None
        self._pending: Final[dict[str, float]] = {}
        self._now: Final[dict[str, float]] = {}
        self._idle_now: Final[set[str]] = set()
        self._not_passed: Final[set[str]] = set()

    @property
    def before(self) -> dict[str, float]:
        """Seconds by test, from runs before this one."""
        if self._before is None:
            kept = self._cache.get(_KEY, {}) if self._cache is not None else {}
            self._before = {
                str(name): float(seconds)
                for name, seconds in (kept.items() if isinstance(kept, dict) else ())
                if isinstance(seconds, int | float)
            }
        return self._before

    @property
    def idle(self) -> set[str]:
        """Tests that used no card in the last run that had them."""
        kept = self._cache.get(_IDLE_KEY, []) if self._cache is not None else []
        return set(map(str, kept)) if isinstance(kept, list) else set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up a test's phases; keep those of a test that used a card."""
        if not report.passed:
            self._not_passed.add(report.nodeid)
        seconds = self._pending.pop(report.nodeid, 0.0) + report.duration
        if report.when != "teardown":
            self._pending[report.nodeid] = seconds
        elif has_figures(report.user_properties):
            self._now[report.nodeid] = round(seconds, 3)
        elif report.nodeid not in self._not_passed:
            self._idle_now.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Keep it for later runs."""
        if self._cache is None:
            return
        if self._now:
            self._cache.set(_KEY, {**self.before, **self._now})
        idle = (self.idle | self._idle_now) - self._now.keys()
        if idle != self.idle:
            self._cache.set(_IDLE_KEY, sorted(idle))
