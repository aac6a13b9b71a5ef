"""How long tests that use a card took in earlier runs, kept in pytest's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.plugin.marks import has_figures

if TYPE_CHECKING:
    import pytest

#: Where pytest's cache keeps it: seconds by test.
_KEY: Final = "gpumem/seconds"


class History:
    """Reads and notes the seconds of tests that use a card; not in workers.

    Args:
        config: The run's; without a cache nothing is known and nothing kept.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._cache: Final[Any] = getattr(config, "cache", None)
        self._before: dict[str, float] | None = None
        self._pending: Final[dict[str, float]] = {}
        self._now: Final[dict[str, float]] = {}

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

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up a test's phases; keep those of a test that used a card."""
        seconds = self._pending.pop(report.nodeid, 0.0) + report.duration
        if report.when != "teardown":
            self._pending[report.nodeid] = seconds
        elif has_figures(report.user_properties):
            self._now[report.nodeid] = round(seconds, 3)

    def pytest_sessionfinish(self) -> None:
        """Keep the seconds for later runs."""
        if self._cache is not None and self._now:
            self._cache.set(_KEY, {**self.before, **self._now})
