"""Serves models under their hub names: for the run, and for single tests by marker."""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.errors import GpuMemError
from pytest_gpumem.plugin.marks import marked
from pytest_gpumem.plugin.usage import UsageErrors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from pytest_gpumem.hub import HubModel
    from pytest_gpumem.plugin.settings import Settings

MARKER: Final = "hub_model"


class HubModels:
    """Serves the models of the options from the run's start, and those of tests' markers.

    Args:
        settings: The run's options.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings: Final = settings
        self._served: Final = ExitStack()
        self._by_test: Final[dict[pytest.Item, list[HubModel]]] = {}

    def start(self) -> None:
        """Serve the models of the options, before any conftest is imported."""
        if self._settings.hub_models:
            self._serve(self._served, self._settings.hub_models)

    def stop(self) -> None:
        """Stop serving models."""
        self._served.close()

    def _serve(self, stack: ExitStack, models: Sequence[HubModel]) -> None:
        from pytest_gpumem.hub.service import serving

        reaches = self._settings.reaches_children
        stack.enter_context(serving(models, reaches_children=reaches))

    def pytest_report_header(self) -> str | None:
        """Print which models are served."""
        models = self._settings.hub_models
        if not models:
            return None
        return f"gpumem: hub models {'; '.join(str(each) for each in models)}"

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Stop serving models."""
        self.stop()

    # -- tests ----------------------------------------------------------------------------

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Read the markers.

        Raises:
            pytest.UsageError: A marker makes no sense.
        """
        with UsageErrors(config).reported(items):
            for item, marks in marked(items, {MARKER}):
                # The last one wins: the nearest.
                self._by_test[item] = [_read(item, mark) for mark in marks][::-1]
        if self._by_test and not config.pluginmanager.has_plugin("gpumem-hub-tests"):
            config.pluginmanager.register(
                _MarkedTests(self._by_test, self._serve), "gpumem-hub-tests"
            )


class HubAdvice:
    """Adds advice to the failure of a test if its model is not served."""

    @staticmethod
    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> None:
        """Add advice to a failure if the hub did not return a model.

        The report is made after this, by another plugin.
        """
        if call.excinfo is not None and "huggingface_hub.errors" in sys.modules:
            from pytest_gpumem.hub import advise, served_names

            advise(call.excinfo.value, served_names())


class _MarkedTests:
    """The hook around each test, in a run in which some tests have the marker.

    Args:
        by_test: The models of each test.
        serve: Serves models until a stack is closed.
    """

    def __init__(
        self,
        by_test: dict[pytest.Item, list[HubModel]],
        serve: Callable[[ExitStack, list[HubModel]], None],
    ) -> None:
        self._by_test: Final = by_test
        self._serve: Final = serve

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item
    ) -> Generator[None, object, object]:
        """Serve the models of a test's markers, from its setup to its teardown."""
        with ExitStack() as stack:
            models = self._by_test.get(item)
            if models is not None:
                self._serve(stack, models)
            return (yield)


def _read(item: pytest.Item, mark: pytest.Mark) -> HubModel:
    from pytest_gpumem.hub import hub_model

    def reader(name: Any, source: Any = None, **options: Any) -> HubModel:
        if not isinstance(name, str):
            raise TypeError(f"name={name!r} is not a text such as 'bert-large-uncased'")
        return hub_model(name, source, options, base=item.path.parent)

    try:
        inspect.signature(reader).bind(*mark.args, **mark.kwargs)
        return reader(*mark.args, **mark.kwargs)
    except (GpuMemError, TypeError) as error:
        raise pytest.UsageError(
            f"{item.nodeid}: @pytest.mark.{MARKER}: {error}"
        ) from None
