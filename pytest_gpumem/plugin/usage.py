"""Ends the run with exit code 4 for a wrong marker, also if a worker finds it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The node id of the report with which a worker reports a wrong marker.
_NODEID: Final = "gpumem-usage"


class UsageErrors:
    """Makes the controller of pytest-xdist raise a worker's usage error.

    pytest-xdist does not show an error that a worker raises.

    Args:
        config: The run's config.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config: Final = config
        self._is_worker: Final = hasattr(config, "workerinput")

    @contextmanager
    def reported(self, items: list[pytest.Item]) -> Iterator[None]:
        """Report a usage error of the block; the worker then runs no tests.

        Raises:
            pytest.UsageError: The block raised it, and this process is not a worker.
        """
        try:
            yield
        except pytest.UsageError as error:
            if not self._is_worker:
                raise
            report = pytest.CollectReport(_NODEID, "failed", str(error), [])
            self._config.hook.pytest_collectreport(report=report)
            items.clear()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """End the run for the usage error of a worker.

        Raises:
            pytest.UsageError: A worker has reported one.
        """
        if report.nodeid == _NODEID and not self._is_worker:
            raise pytest.UsageError(str(report.longrepr))
