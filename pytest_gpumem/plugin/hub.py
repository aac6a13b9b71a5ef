"""Models served under their hub names: for the run, and for single tests by marker."""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.errors import GpuMemError

if TYPE_CHECKING:
    from collections.abc import Generator

    from pytest_gpumem.hub import HubModel
    from pytest_gpumem.plugin.settings import Settings

MARKER: Final = "hub_model"


class HubModels:
    """What a run serves from its start on, and what its tests ask for.

    Args:
        settings: The run's options.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings: Final = settings
        self._served: Final = ExitStack()
        self._by_test: Final[dict[pytest.Item, list[HubModel]]] = {}

    def start(self) -> None:
        """Serve what the options name, before any conftest is imported."""
        if self._settings.hub_models:
            self._serve(self._served, self._settings.hub_models)

    def stop(self) -> None:
        """Serve nothing any more."""
        self._served.close()

    def _serve(self, stack: ExitStack, models: Any) -> None:
        from pytest_gpumem.hub.service import serving  # noqa: PLC0415  # there are some

        reaches = self._settings.reaches_children
        stack.enter_context(serving(models, reaches_children=reaches))

    def pytest_report_header(self) -> str | None:
        """Say which models are served."""
        models = self._settings.hub_models
        if not models:
            return None
        return f"gpumem: hub models {'; '.join(str(each) for each in models)}"

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Serve nothing any more."""
        self.stop()

    # -- tests ----------------------------------------------------------------------------

    def read(self, item: pytest.Item) -> None:
        """Read a test's markers.

        Raises:
            pytest.UsageError: One makes no sense.
        """
        found = [_read(item, mark) for mark in item.iter_markers(MARKER)]
        if found:
            self._by_test[item] = found[::-1]  # the nearest last: it wins

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item
    ) -> Generator[None, object, object]:
        """Serve what a test's markers name, from its setup to its teardown."""
        with ExitStack() as stack:
            models = self._by_test.get(item)
            if models is not None:
                self._serve(stack, models)
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Say what to do about a model that the hub did not give."""
        if call.excinfo is not None and "huggingface_hub.errors" in sys.modules:
            from pytest_gpumem.hub import advise  # noqa: PLC0415  # a test failed

            advise(call.excinfo.value)
        return (yield)


def _read(item: pytest.Item, mark: pytest.Mark) -> HubModel:
    from pytest_gpumem.hub import hub_model  # noqa: PLC0415  # there is a marker

    def reader(name: Any, source: Any = None, **options: Any) -> HubModel:
        if not isinstance(name, str):
            raise TypeError(f"name={name!r} is no text such as 'bert-large-uncased'")
        return hub_model(name, source, options, base=item.path.parent)

    try:
        inspect.signature(reader).bind(*mark.args, **mark.kwargs)
        return reader(*mark.args, **mark.kwargs)
    except (GpuMemError, TypeError) as error:
        raise pytest.UsageError(
            f"{item.nodeid}: @pytest.mark.{MARKER}: {error}"
        ) from None
