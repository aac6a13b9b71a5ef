"""Waits for modules that query NVML, and gives them the answers of simulated cards.

The code that answers is imported together with the first of these modules, because most
programs import none of them.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Final

from pytest_gpumem.devices.on_import import AfterImport

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine
    from pytest_gpumem.devices.simulated_nvml import SimulatedNvml

#: The module of py3nvml, which has NVML's functions of its own.
PY3NVML: Final = "py3nvml.py3nvml"
#: The modules with NVML's functions; ``pynvml`` was a package before its version 12.
MODULES: Final = ("pynvml.nvml", "pynvml", PY3NVML)


class NvmlHook:
    """Installs ``SimulatedNvml``, immediately or when a module of ``MODULES`` is imported.

    Args:
        machine: Returns the present cards, or None if there are none yet.
    """

    def __init__(self, machine: Callable[[], SimulatedMachine | None]) -> None:
        self._machine = machine
        self._hooks = [
            AfterImport(name, partial(self._replace, name)) for name in MODULES
        ]
        self._installed: list[SimulatedNvml] = []

    def start(self) -> None:
        """Replace the modules' functions, now or when the modules are imported."""
        for hook in self._hooks:
            hook.start()

    def stop(self) -> None:
        """Restore the modules' functions; may be called twice."""
        for hook in self._hooks:
            hook.stop()
        while self._installed:
            self._installed.pop().remove()

    def _replace(self, name: str) -> None:
        from pytest_gpumem.devices.simulated_nvml import SimulatedNvml

        nvml = SimulatedNvml(sys.modules[name], self._machine)
        nvml.install()
        self._installed.append(nvml)
