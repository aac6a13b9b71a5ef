"""Handles a run without a device: torch and the tests are left unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import pytest

from pytest_gpumem.plugin import marks
from pytest_gpumem.plugin.usage import UsageErrors

if TYPE_CHECKING:
    from pytest_gpumem.plugin.settings import Settings

#: Advice for a run without a device.
_HOW: Final = (
    "this run asks for no device; put 'gpu_backend = auto' into the ini file, or give "
    "--gpu-backend=auto"
)


class Inactive:
    """Replaces ``Run`` in a run without a device, and says how to get one.

    Args:
        settings: The options, with their defaults.
        config: The run's config.
    """

    def __init__(self, settings: Settings, config: pytest.Config) -> None:
        self.settings: Final = settings
        self._errors: Final = UsageErrors(config)
        config.pluginmanager.register(self._errors, "gpumem-usage")

    def require_device(self) -> NoReturn:
        """Fail the test, because its fixture needs a device.

        Raises:
            pytest.fail.Exception: Always.
        """
        pytest.fail(f"a fixture of gpumem needs a device, but {_HOW}", pytrace=False)

    def pytest_report_header(self) -> str:
        """Print that the plugin does nothing, and how to change that."""
        return (
            "gpumem: not in use, as no option or ini setting asks for it "
            "(gpu_backend = auto does)"
        )

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Reject markers of the plugin, because they would have no effect.

        Raises:
            pytest.UsageError: A test has such a marker.
        """
        with self._errors.reported(items):
            found = marks.first_of_ours(items)
            if found is not None:
                item, name = found
                raise pytest.UsageError(
                    f"{item.nodeid}: @pytest.mark.{name} needs a device, but {_HOW}"
                )
