"""``max_vram_leak(repeat=...)``: runs a test's body again, which may not add memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.errors import GrowthError
from pytest_gpumem.plugin.limits import fail

if TYPE_CHECKING:
    from pytest_gpumem.plugin.marks import Markers
    from pytest_gpumem.plugin.session import Run


class Repeats:
    """Calls tests several times, with the same fixtures.

    Args:
        run: The run, for its device.
        markers: The arguments of the tests' markers.
    """

    def __init__(self, run: Run, markers: dict[pytest.Item, Markers]) -> None:
        self._run: Final = run
        self._markers: Final = markers

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> object | None:
        """Call a test as often as its marker says; fail it if each run adds memory."""
        markers = self._markers.get(pyfuncitem)
        leak = None if markers is None or markers.sweep else markers.leak
        if leak is None or leak.repeat is None:
            return None
        from pytest_gpumem.instruments.steady import steady

        names = pyfuncitem._fixtureinfo.argnames  # noqa: SLF001  # as pytest's own hook calls a test
        arguments = {name: pyfuncitem.funcargs[name] for name in names}
        runs = steady(
            leak.warmup + leak.repeat,
            warmup=leak.warmup,
            allowed=leak.nbytes,
            device=self._run.require_device(),
        )
        try:
            for _run in runs:
                pyfuncitem.obj(**arguments)
        except GrowthError as error:
            fail(pyfuncitem, f"VRAM leak: {error}")
        return True
