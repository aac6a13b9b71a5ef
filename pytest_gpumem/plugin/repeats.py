"""Calls a test's body again, and fails it if each run adds memory.

``max_vram_leak(repeat=...)`` asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.errors import GrowthError
from pytest_gpumem.plugin.limits import fail

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.plugin.marks import MarkersByTest
    from pytest_gpumem.plugin.session import Run


def body_of(item: pytest.Function) -> Callable[[], object]:
    """Return a function that calls a test as pytest does, with the fixtures it has now."""
    names = item._fixtureinfo.argnames  # noqa: SLF001  # no public name
    arguments = {name: item.funcargs[name] for name in names}
    return lambda: item.obj(**arguments)


class Repeats:
    """Calls tests several times, with the same fixtures.

    Args:
        run: The run, for its device.
        markers: The arguments of the tests' markers.
    """

    def __init__(self, run: Run, markers: MarkersByTest) -> None:
        self._run: Final = run
        self._markers: Final = markers

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> object | None:
        """Call a test as often as its marker says; fail it if each run adds memory.

        A test that is also swept is swept afterwards.
        """
        markers = self._markers[pyfuncitem]
        leak = markers.leak
        if leak is None or leak.repeat is None:
            return None
        if markers.sweep is not None and self._run.settings.replay is not None:
            return None  # only the point of the sweep is asked for
        from pytest_gpumem.instruments.steady import steady

        body = body_of(pyfuncitem)
        runs = steady(
            leak.warmup + leak.repeat,
            warmup=leak.warmup,
            allowed=leak.nbytes,
            device=self._run.require_device(),
        )
        try:
            for _run in runs:
                body()
        except GrowthError as error:
            fail(pyfuncitem, f"VRAM leak: {error}")
        return None if markers.sweep is not None else True
