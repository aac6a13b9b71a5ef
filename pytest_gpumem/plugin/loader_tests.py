"""``--gpu-check``: tests a project's loader without a test file."""

from __future__ import annotations

from contextlib import ExitStack
from types import ModuleType
from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.checking.named_function import working_folder_importable
from pytest_gpumem.errors import CheckError
from pytest_gpumem.plugin.sweeps import CHOSEN_BY
from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.sweeps.report import MODES, mode_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.checking.check_report import CheckRequest


class LoaderTests:
    """Adds the tests that ``pytest-gpumem check --write`` would write.

    Args:
        request: The loader.
        replay: The rule of the one point to run; None runs all.
        config: The run's config. If its command line names no tests, pytest collects none.

    Raises:
        pytest.UsageError: The loader does not exist.
    """

    def __init__(
        self, request: CheckRequest, replay: str | None, config: pytest.Config
    ) -> None:
        self._request: Final = request
        self._mode = None if replay is None else mode_of(parse_rule(replay))
        stack = ExitStack()
        stack.enter_context(working_folder_importable())
        config.add_cleanup(stack.close)
        try:
            request.resolve()
        except CheckError as error:
            raise pytest.UsageError(f"--gpu-check: {error}") from None
        if config.args_source is not pytest.Config.ArgsSource.ARGS:
            config.args = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(
        self, session: pytest.Session, items: list[pytest.Item]
    ) -> None:
        """Add the tests, as if they had been collected."""
        name = str(self._request)
        path = session.config.rootpath / name
        module = _Module.from_parent(session, path=path, nodeid=name)
        module.request = self._request
        for item in session.genitems(module):
            if self._mode is not None and not item.name.endswith(f"[{self._mode}]"):
                continue
            item.stash[CHOSEN_BY] = f"--gpu-check={name}"
            items.append(item)


class _Module(pytest.Module):
    """A test module without a file, with the same tests as ``as_test_file`` writes."""

    request: CheckRequest

    def _getobj(self) -> ModuleType:
        load, run = self.request.resolve()

        def test_it_ends_where_it_should(fallback: Callable[..., object]) -> None:
            """Under each budget and fault; an error that is not an OOM comes through."""
            __tracebackhide__ = True
            fallback(load, run=run, variants=True)

        @pytest.mark.parametrize("mode", MODES)
        def test_it_survives_failed_allocations(
            oom_sweep: Callable[..., object], mode: str
        ) -> None:
            """Each place that allocates: once alone, once with all later ones."""
            __tracebackhide__ = True
            oom_sweep(
                load,
                run=run or (lambda _loaded: None),
                variants=True,
                points="ends",
                modes=[mode],
                recover=mode == "transient",
            )

        module = ModuleType(self.name)
        for test in (test_it_ends_where_it_should, test_it_survives_failed_allocations):
            test.__module__ = self.name
            setattr(module, test.__name__, test)
        return module
