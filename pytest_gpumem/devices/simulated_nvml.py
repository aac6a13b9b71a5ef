"""NVML for simulated cards; as in NVML, these are all cards of the machine.

``pynvml`` (nvidia-ml-py) queries NVIDIA's driver, which must not happen while cards are
simulated. The functions with which programs read memory are replaced. Every other device
function raises "Not Supported", as NVML does for a feature that a card lacks.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from pytest_gpumem.cards import CUDA_VERSION, DRIVER_VERSION
from pytest_gpumem.devices.nvml import MemoryInfo, memory_info
from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.visibility import uuid_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """``nvmlProcessInfo_t``: the bytes that a process holds on a card."""

    pid: int
    usedGpuMemory: int  # noqa: N815  # NVML's name
    gpuInstanceId: int = 0xFFFFFFFF  # noqa: N815  # NVML's name
    computeInstanceId: int = 0xFFFFFFFF  # noqa: N815  # NVML's name


@dataclass(frozen=True, slots=True)
class Utilization:
    """``nvmlUtilization_t``; a simulated card computes nothing."""

    gpu: int = 0
    memory: int = 0


def _cuda_driver_version() -> int:
    """Return the CUDA version in NVML's format: 13.0 is 13000."""
    major, minor = CUDA_VERSION.split(".")
    return int(major) * 1000 + int(minor) * 10


@dataclass(frozen=True, slots=True)
class Handle:
    """``nvmlDevice_t`` of a simulated card."""

    index: int


class SimulatedNvml:
    """Replaces the functions of ``pynvml`` for simulated cards.

    Args:
        module: The imported ``pynvml``.
        machine: Returns the present cards, or None if there are none yet.
    """

    def __init__(
        self, module: Any, machine: Callable[[], SimulatedMachine | None]
    ) -> None:
        self._module = module
        self._machine = machine
        self._patches = PatchSet()

    def install(self) -> None:
        """Replace the module's functions."""

        @wraps(self._uncapped)
        def memory(handle: Handle, version: Any = None) -> MemoryInfo:
            return self._memory(handle, version)

        own = {
            "nvmlInit": lambda: None,
            "nvmlInitWithFlags": lambda _flags: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self._cards()),
            "nvmlDeviceGetHandleByIndex": self._handle,
            "nvmlDeviceGetHandleByUUID": self._handle_by_uuid,
            "nvmlDeviceGetIndex": lambda handle: handle.index,
            "nvmlDeviceGetName": lambda handle: self._card(handle).card.name,
            "nvmlDeviceGetUUID": lambda handle: uuid_of(handle.index),
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetUtilizationRates": lambda _handle: Utilization(),
            "nvmlDeviceGetComputeRunningProcesses": self._running,
            "nvmlDeviceGetComputeRunningProcesses_v2": self._running,
            "nvmlDeviceGetComputeRunningProcesses_v3": self._running,
            "nvmlDeviceGetGraphicsRunningProcesses": lambda _handle: [],
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (
                self._card(handle).card.compute_capability
            ),
            "nvmlDeviceGetCpuAffinity": self._cores,
            "nvmlDeviceGetCpuAffinityWithinScope": (
                lambda handle, size, _scope: self._cores(handle, size)
            ),
            "nvmlSystemGetDriverVersion": lambda: DRIVER_VERSION,
            "nvmlSystemGetCudaDriverVersion": _cuda_driver_version,
            "nvmlSystemGetCudaDriverVersion_v2": _cuda_driver_version,
        }
        for name in dir(self._module):
            if name.startswith("nvmlDevice") and callable(getattr(self._module, name)):
                self._patches.set(self._module, name, self._unsupported)
        for name, function in own.items():
            self._patches.set(self._module, name, function)

    def remove(self) -> None:
        """Restore the module's functions."""
        self._patches.restore()

    def _error(self, code: str) -> Exception:
        error: Exception = self._module.NVMLError(getattr(self._module, code))
        return error

    def _unsupported(self, *_args: Any, **_kwargs: Any) -> Any:
        raise self._error("NVML_ERROR_NOT_SUPPORTED")

    def _cards(self) -> tuple[Any, ...]:
        machine = self._machine()
        if machine is None:
            raise self._error("NVML_ERROR_UNINITIALIZED")
        return machine.all_cards

    def _card(self, handle: Handle) -> Any:
        return self._cards()[handle.index]

    def _handle(self, index: int) -> Handle:
        if not 0 <= index < len(self._cards()):
            raise self._error("NVML_ERROR_INVALID_ARGUMENT")
        return Handle(index)

    def _handle_by_uuid(self, uuid: str | bytes) -> Handle:
        text = uuid.decode() if isinstance(uuid, bytes) else uuid
        for index in range(len(self._cards())):
            if uuid_of(index) == text:
                return Handle(index)
        raise self._error("NVML_ERROR_NOT_FOUND")

    def _cores(self, handle: Handle, size: int) -> list[int]:
        """Return the CPU cores near a card, which are all cores, as 64-bit words."""
        self._card(handle)
        if size < 1:
            raise self._error("NVML_ERROR_INVALID_ARGUMENT")
        mask = (1 << (os.cpu_count() or 1)) - 1
        return [mask >> (64 * word) & (2**64 - 1) for word in range(size)]

    def _memory(self, handle: Handle, version: Any = None) -> MemoryInfo:  # noqa: ARG002  # NVML's signature
        return memory_info(*self._card(handle).mem_get_info())

    def _uncapped(self, handle: Handle, version: Any = None) -> MemoryInfo:  # noqa: ARG002  # NVML's signature
        driver = self._card(handle).driver
        return memory_info(driver.free_bytes, driver.total_bytes)

    def _running(self, handle: Handle) -> list[ProcessInfo]:
        driver = self._card(handle).driver
        used = driver.process_bytes
        own = [ProcessInfo(os.getpid(), used)] if used else []
        return own + [ProcessInfo(*each) for each in driver.other_processes()]


class NvmlHook:
    """Installs ``SimulatedNvml``, immediately or when ``pynvml`` is imported.

    Args:
        machine: Returns the present cards, or None if there are none yet.
    """

    def __init__(self, machine: Callable[[], SimulatedMachine | None]) -> None:
        self._machine = machine
        self._hook = AfterImport("pynvml", self._imported)
        self._nvml: SimulatedNvml | None = None

    def start(self) -> None:
        """Replace the module's functions, now or when the module is imported."""
        self._hook.start()

    def stop(self) -> None:
        """Restore the module's functions; may be called twice."""
        self._hook.stop()
        if self._nvml is not None:
            self._nvml.remove()
            self._nvml = None

    def _imported(self) -> None:
        self._nvml = SimulatedNvml(sys.modules["pynvml"], self._machine)
        self._nvml.install()
