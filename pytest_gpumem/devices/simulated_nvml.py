"""NVML for simulated cards; as in NVML, these are all cards of the machine.

``pynvml`` (nvidia-ml-py) queries NVIDIA's driver, which must not happen while cards are
simulated. The functions with which programs read memory are replaced. Every other device
function raises "Not Supported", as NVML does for a feature that a card lacks.

Note [What NVML says of slices and of shared memory]
NVML counts GPUs, not slices (MIG). A GPU in MIG mode answers for all its slices together;
each slice has a handle of its own. A card without memory of its own (GB10, Jetson) gives
no memory; that of a Jetson Orin lists no processes either.
Source: NVML API Reference, "Multi Instance GPU Management"; NVIDIA Multi-Instance GPU
User Guide; DGX Spark User Guide, "Known Issues"; answers of such cards in public issues.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.cards import CARDS, CUDA_VERSION, DRIVER_VERSION
from pytest_gpumem.cards_table import SLICES_OF_COMPUTE, memory_slices
from pytest_gpumem.devices.nvml import MemoryInfo, memory_info
from pytest_gpumem.devices.nvml_hook import PY3NVML
from pytest_gpumem.devices.nvml_library import NvmlLibrary
from pytest_gpumem.devices.patches import PatchSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.cards import Gpu
    from pytest_gpumem.devices.simulated.machine import SimulatedCard, SimulatedMachine


#: The ids of instances of a process that is on no slice (MIG). Source: ``nvml.h``.
_NO_INSTANCE: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """``nvmlProcessInfo_t``: the bytes that a process holds on a card."""

    pid: int
    usedGpuMemory: int  # noqa: N815  # NVML's name
    gpuInstanceId: int = _NO_INSTANCE  # noqa: N815  # NVML's name
    computeInstanceId: int = _NO_INSTANCE  # noqa: N815  # NVML's name


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
class PciInfo:
    """``nvmlPciInfo_t``: where a GPU is on the bus."""

    domain: int
    bus: int
    device: int
    busId: str  # noqa: N815  # NVML's name
    busIdLegacy: str  # noqa: N815  # NVML's name
    pciDeviceId: int = 0  # noqa: N815  # NVML's name
    pciSubSystemId: int = 0  # noqa: N815  # NVML's name


@dataclass(frozen=True, slots=True)
class Attributes:
    """``nvmlDeviceAttributes_t``: what a slice (MIG) has of its GPU."""

    multiprocessorCount: int  # noqa: N815  # NVML's name
    gpuInstanceSliceCount: int  # noqa: N815  # NVML's name
    computeInstanceSliceCount: int  # noqa: N815  # NVML's name
    memorySizeMB: int  # noqa: N815  # NVML's name
    sharedCopyEngineCount: int = 1  # noqa: N815  # NVML's name
    sharedDecoderCount: int = 0  # noqa: N815  # NVML's name
    sharedEncoderCount: int = 0  # noqa: N815  # NVML's name
    sharedJpegCount: int = 0  # noqa: N815  # NVML's name
    sharedOfaCount: int = 0  # noqa: N815  # NVML's name


@dataclass(frozen=True, slots=True)
class Handle:
    """``nvmlDevice_t`` of a GPU, or of a slice of it.

    Attributes:
        index: The GPU's index.
        slice_index: The slice's index on its GPU; None is the GPU itself.
    """

    index: int
    slice_index: int | None = None


#: Source: ``NVML_DEVICE_MIG_DISABLE`` and ``NVML_DEVICE_MIG_ENABLE`` of ``nvml.h``.
_MIG_MODES: Final = {False: 0, True: 1}


class SimulatedNvml:
    """Replaces the functions of ``pynvml`` for simulated cards.

    See Note [What NVML says of slices and of shared memory].

    Args:
        module: The imported ``pynvml``.
        machine: Returns the present cards, or None if there are none yet.
    """

    def __init__(
        self, module: Any, machine: Callable[[], SimulatedMachine | None]
    ) -> None:
        self._module = module
        self._get_machine = machine
        self._patches = PatchSet()

    def install(self) -> None:
        """Replace the module's functions."""

        @wraps(self._uncapped)
        def memory(handle: Handle, version: Any = None) -> MemoryInfo:
            return self._memory(handle, version)

        own: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlInitWithFlags": lambda _flags: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: len(self._machine().gpus),
            "nvmlDeviceGetHandleByIndex": self._handle,
            "nvmlDeviceGetHandleByUUID": self._handle_by_uuid,
            "nvmlDeviceGetHandleByPciBusId": self._handle_by_bus,
            "nvmlDeviceGetIndex": self._index,
            "nvmlDeviceGetName": self._name,
            "nvmlDeviceGetUUID": self._uuid,
            "nvmlDeviceGetPciInfo": self._pci_info,
            "nvmlDeviceGetPciInfo_v3": self._pci_info,
            "nvmlDeviceGetMemoryInfo": memory,
            "nvmlDeviceGetUtilizationRates": self._utilization,
            "nvmlDeviceGetComputeRunningProcesses": self._running,
            "nvmlDeviceGetComputeRunningProcesses_v2": self._running,
            "nvmlDeviceGetComputeRunningProcesses_v3": self._running,
            "nvmlDeviceGetGraphicsRunningProcesses": lambda _handle: [],
            "nvmlDeviceGetGraphicsRunningProcesses_v2": lambda _handle: [],
            "nvmlDeviceGetGraphicsRunningProcesses_v3": lambda _handle: [],
            "nvmlDeviceGetCudaComputeCapability": lambda handle: (
                self._gpu(handle).card.compute_capability
            ),
            "nvmlDeviceGetCpuAffinity": self._cores,
            "nvmlDeviceGetCpuAffinityWithinScope": (
                lambda handle, size, _scope: self._cores(handle, size)
            ),
            "nvmlDeviceGetMigMode": self._mig_mode,
            "nvmlDeviceGetMaxMigDeviceCount": self._most_slices,
            "nvmlDeviceGetMigDeviceHandleByIndex": self._slice_handle,
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": (
                lambda handle: Handle(self._slice(handle).index)
            ),
            "nvmlDeviceIsMigDeviceHandle": (
                lambda handle: int(handle.slice_index is not None)
            ),
            "nvmlDeviceGetGpuInstanceId": lambda handle: self._instance(handle)[0],
            "nvmlDeviceGetComputeInstanceId": lambda handle: self._instance(handle)[1],
            "nvmlDeviceGetAttributes": self._attributes,
            "nvmlDeviceGetAttributes_v2": self._attributes,
            "nvmlSystemGetDriverVersion": lambda: DRIVER_VERSION,
            "nvmlSystemGetCudaDriverVersion": _cuda_driver_version,
            "nvmlSystemGetCudaDriverVersion_v2": _cuda_driver_version,
        }
        for name in dir(self._module):
            if name.startswith("nvmlDevice") and callable(getattr(self._module, name)):
                self._patches.set(self._module, name, self._unsupported)
        for name, function in own.items():
            self._patches.set(self._module, name, function)
        # nvitop fetches functions in C with it, and functions above that are not replaced.
        library = NvmlLibrary(own, self._module.NVMLError)
        self._patches.set(self._module, "_nvmlGetFunctionPointer", library.function)

    def remove(self) -> None:
        """Restore the module's functions."""
        self._patches.restore()

    def _error(self, code: str) -> Exception:
        error: Exception = self._module.NVMLError(getattr(self._module, code))
        return error

    def _unsupported(self, *_args: Any, **_kwargs: Any) -> Any:
        raise self._error("NVML_ERROR_NOT_SUPPORTED")

    def _machine(self) -> SimulatedMachine:
        machine = self._get_machine()
        if machine is None:
            raise self._error("NVML_ERROR_UNINITIALIZED")
        return machine

    # -- handles ------------------------------------------------------------------------

    def _gpu(self, handle: Handle) -> Gpu:
        return self._machine().gpus[handle.index]

    def _cards(self, handle: Handle) -> list[SimulatedCard]:
        """Return the cards that a handle means: one, or all slices of a GPU."""
        cards = self._machine().all_cards
        numbers = self._gpu(handle).numbers
        if handle.slice_index is not None:
            numbers = (numbers[handle.slice_index],)
        return [cards[number] for number in numbers]

    def _slice(self, handle: Handle) -> Handle:
        """Return the handle if it is a slice's."""
        if handle.slice_index is None:
            raise self._error("NVML_ERROR_INVALID_ARGUMENT")
        return handle

    def _handle(self, index: int) -> Handle:
        if not 0 <= index < len(self._machine().gpus):
            raise self._error("NVML_ERROR_INVALID_ARGUMENT")
        return Handle(index)

    def _handle_by_uuid(self, uuid: str | bytes) -> Handle:
        text = uuid.decode() if isinstance(uuid, bytes) else uuid
        machine = self._machine()
        for gpu in machine.gpus:
            if gpu.uuid == text:
                return Handle(gpu.index)
            for position, number in enumerate(gpu.numbers):
                if machine.uuids[number] == text:
                    return Handle(gpu.index, position)
        raise self._error("NVML_ERROR_NOT_FOUND")

    def _handle_by_bus(self, bus_id: str | bytes) -> Handle:
        text = bus_id.decode() if isinstance(bus_id, bytes) else bus_id
        domain, _colon, address = text.upper().partition(":")
        for gpu in self._machine().gpus:
            if f"{int(domain, 16):08X}:{address}" == gpu.bus_id:
                return Handle(gpu.index)
        raise self._error("NVML_ERROR_NOT_FOUND")

    def _slice_handle(self, handle: Handle, index: int) -> Handle:
        gpu = self._gpu(handle)
        if not gpu.is_divided or not 0 <= index < len(gpu.numbers):
            raise self._error("NVML_ERROR_NOT_FOUND")
        return Handle(handle.index, index)

    # -- what a handle is ---------------------------------------------------------------

    def _index(self, handle: Handle) -> int:
        return handle.index if handle.slice_index is None else handle.slice_index

    def _name(self, handle: Handle) -> str:
        if handle.slice_index is None:
            card = self._gpu(handle).card
            return card.nvml_name or card.name
        return self._cards(handle)[0].card.name

    def _uuid(self, handle: Handle) -> str:
        if handle.slice_index is None:
            return self._gpu(handle).uuid
        return self._cards(handle)[0].uuid

    def _pci_info(self, handle: Handle) -> PciInfo:
        gpu = self._gpu(handle)
        names: Any = (gpu.bus_id, gpu.bus_id.removeprefix("0000"))
        if self._module.__name__ == PY3NVML:
            names = [each.encode() for each in names]  # its structures have bytes
        return PciInfo(0, gpu.bus, 0, *names)

    def _mig_mode(self, handle: Handle) -> list[int]:
        """Return the present mode, and that after the next reset."""
        gpu = self._gpu(handle)
        if not gpu.can_be_divided or handle.slice_index is not None:
            raise self._error("NVML_ERROR_NOT_SUPPORTED")
        return [_MIG_MODES[gpu.is_divided]] * 2

    def _most_slices(self, handle: Handle) -> int:
        return SLICES_OF_COMPUTE if self._gpu(handle).is_divided else 0

    def _instance(self, handle: Handle) -> tuple[int, int]:
        """Return the ids of a slice's GPU instance and of its compute instance."""
        self._slice(handle)
        cards = [each.card for each in self._machine().all_cards]
        return self._gpu(handle).instances(cards)[handle.slice_index or 0]

    def _attributes(self, handle: Handle) -> Attributes:
        (card,) = (each.card for each in self._cards(self._slice(handle)))
        compute = int(card.profile[0])
        return Attributes(
            card.multi_processor_count,
            memory_slices(CARDS[card.parent], card.total_bytes),
            compute,
            card.total_bytes // 2**20,
        )

    def _cores(self, handle: Handle, size: int) -> list[int]:
        """Return the CPU cores near a card, which are all cores, as 64-bit words."""
        self._gpu(handle)
        if size < 1:
            raise self._error("NVML_ERROR_INVALID_ARGUMENT")
        mask = (1 << (os.cpu_count() or 1)) - 1
        return [mask >> (64 * word) & (2**64 - 1) for word in range(size)]

    # -- its memory and processes -------------------------------------------------------

    def _memory(self, handle: Handle, version: Any = None) -> MemoryInfo:  # noqa: ARG002  # NVML's signature
        return self._sum(handle, [each.mem_get_info() for each in self._cards(handle)])

    def _uncapped(self, handle: Handle, version: Any = None) -> MemoryInfo:  # noqa: ARG002  # NVML's signature
        drivers = [each.driver for each in self._cards(handle)]
        return self._sum(handle, [(one.free_bytes, one.total_bytes) for one in drivers])

    def _sum(self, handle: Handle, infos: list[tuple[int, int]]) -> MemoryInfo:
        """Return a card's memory, or that of a whole GPU from that of its slices."""
        gpu = self._gpu(handle)
        if gpu.card.is_integrated:
            raise self._error("NVML_ERROR_NOT_SUPPORTED")
        if handle.slice_index is None and gpu.is_divided:
            used = sum(total - free for free, total in infos)
            return memory_info(gpu.card.total_bytes - used, gpu.card.total_bytes)
        return memory_info(*infos[0])

    def _utilization(self, handle: Handle) -> Utilization:
        if self._gpu(handle).is_divided or self._gpu(handle).card.nvml_name:
            raise self._error("NVML_ERROR_NOT_SUPPORTED")
        return Utilization()

    def _running(self, handle: Handle) -> list[ProcessInfo]:
        gpu = self._gpu(handle)
        if gpu.card.nvml_name:
            raise self._error("NVML_ERROR_NOT_SUPPORTED")
        cards = self._cards(handle)
        if gpu.is_divided:
            names = gpu.instances([each.card for each in self._machine().all_cards])
            if handle.slice_index is not None:
                names = [names[handle.slice_index]]
        else:
            names = [(_NO_INSTANCE, _NO_INSTANCE)]
        return [
            ProcessInfo(pid, nbytes, *name)
            for card, name in zip(cards, names, strict=True)
            for pid, nbytes in _processes(card)
        ]


def _processes(card: SimulatedCard) -> list[tuple[int, int]]:
    """Return the id and the bytes of every process on a card."""
    return [
        (os.getpid() if pid is None else pid, nbytes)
        for pid, nbytes in card.driver.processes()
        if nbytes or pid is not None
    ]
