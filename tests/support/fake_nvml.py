# ruff: noqa: N802  # the functions have NVML's names
"""NVIDIA's management library as other machines have it, below ``pynvml``.

What is replaced is the C library, so that nvidia-ml-py's own reading of structures and
codes is part of every test.

Source: NVML API Reference, "Device Queries", "Multi Instance GPU Management" and
``nvmlReturn_t``; ``nvml.h``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pynvml

if TYPE_CHECKING:
    import pytest

#: ``NVML_VALUE_NOT_AVAILABLE``.
NOT_AVAILABLE: Final = 2**64 - 1


@dataclass
class Gpu:
    """A card, or a MIG instance of one.

    Attributes:
        uuid: As NVML writes it, with ``GPU-`` or ``MIG-``.
        used: Bytes in use.
        processes: Bytes by process id; None where the driver does not count them.
        instances: The instances of a card in MIG mode.
        errors: Codes by function: what calls for this card answer.
    """

    uuid: str
    used: int = 0
    total: int = 2**34
    processes: dict[int, int | None] = field(default_factory=dict)
    instances: list[Gpu] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)


class FakeLibrary:
    """``libnvidia-ml.so.1`` with these cards.

    Args:
        gpus: The machine's cards, in NVML's order.
        errors: Codes by function: what every call of it answers.
    """

    def __init__(self, *gpus: Gpu, errors: dict[str, int] | None = None) -> None:
        self.gpus = gpus
        self.errors = errors or {}
        self.calls: list[str] = []
        every = [each for gpu in gpus for each in (gpu, *gpu.instances)]
        self._handles = dict(enumerate(every, start=1))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Be the library that ``pynvml`` has loaded.

        Returns:
            The module: a new one, since simulated cards answer for the other.
        """
        spec = importlib.util.find_spec("pynvml")
        assert spec is not None
        assert spec.loader is not None
        module: Any = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        spec.loader.exec_module(module)
        module.nvmlLib = self
        return module

    # -- what every call does -----------------------------------------------------------

    def _code(self, name: str, gpu: Gpu | None = None) -> int:
        self.calls.append(name)
        own = {} if gpu is None else gpu.errors
        return own.get(name, self.errors.get(name, 0))

    def _gpu(self, handle: Any) -> Gpu:
        return self._handles[ctypes.cast(handle, ctypes.c_void_p).value or 0]

    def _give(self, gpu: Gpu, reference: Any) -> int:
        (address,) = (key for key, each in self._handles.items() if each is gpu)
        target = ctypes.pointer(reference._obj)
        target[0] = ctypes.cast(ctypes.c_void_p(address), type(reference._obj))
        return int(pynvml.NVML_SUCCESS)

    # -- the functions, by NVML's names ---------------------------------------------------

    def nvmlInitWithFlags(self, _flags: Any) -> int:
        return self._code("nvmlInitWithFlags")

    def nvmlShutdown(self) -> int:
        return self._code("nvmlShutdown")

    def nvmlSystemGetDriverVersion(self, buffer: Any, _length: Any) -> int:
        buffer.value = b"999.1"
        return self._code("nvmlSystemGetDriverVersion")

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return self._code("nvmlDeviceGetCount_v2")

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> int:
        if index.value >= len(self.gpus):
            return int(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._code("nvmlDeviceGetHandleByIndex_v2") or self._give(
            self.gpus[index.value], device
        )

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, device: Any) -> int:
        code = self._code("nvmlDeviceGetHandleByUUID")
        for gpu in self._handles.values():
            if not code and gpu.uuid == uuid.value.decode():
                return self._give(gpu, device)
        return code or int(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, _length: Any) -> int:
        buffer.value = self._gpu(handle).uuid.encode()
        return self._code("nvmlDeviceGetUUID")

    def nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:
        gpu = self._gpu(handle)
        current._obj.value = pending._obj.value = bool(gpu.instances)
        return self._code("nvmlDeviceGetMigMode", gpu)

    def nvmlDeviceGetMaxMigDeviceCount(self, _handle: Any, count: Any) -> int:
        count._obj.value = 7
        return self._code("nvmlDeviceGetMaxMigDeviceCount")

    def nvmlDeviceGetMigDeviceHandleByIndex(
        self, handle: Any, index: Any, device: Any
    ) -> int:
        instances = self._gpu(handle).instances
        if index.value >= len(instances):
            return int(pynvml.NVML_ERROR_NOT_FOUND)
        return self._give(instances[index.value], device)

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        gpu = self._gpu(handle)
        info = memory._obj
        info.total, info.used, info.free = gpu.total, gpu.used, gpu.total - gpu.used
        return self._code("nvmlDeviceGetMemoryInfo", gpu)

    def nvmlDeviceGetComputeRunningProcesses_v3(
        self, handle: Any, count: Any, found: Any
    ) -> int:
        gpu = self._gpu(handle)
        code = self._code("nvmlDeviceGetComputeRunningProcesses_v3", gpu)
        if code:
            return code
        needed, room = len(gpu.processes), count._obj.value
        count._obj.value = needed
        if needed > room:
            return int(pynvml.NVML_ERROR_INSUFFICIENT_SIZE)
        for place, (pid, nbytes) in enumerate(gpu.processes.items()):
            found[place].pid = pid
            found[place].usedGpuMemory = NOT_AVAILABLE if nbytes is None else nbytes
        return int(pynvml.NVML_SUCCESS)


PROCESSES: Final = "nvmlDeviceGetComputeRunningProcesses_v3"
MIB: Final = 2**20
_OWN: Final = os.getpid()


def machines(uuid: str) -> dict[str, FakeLibrary]:
    """Return machines by what ails them; on all but one NVML cannot count a process.

    Args:
        uuid: The card's, without ``GPU-``.
    """

    def one(
        processes: dict[int, int | None], *, errors: dict[str, int] | None = None
    ) -> FakeLibrary:
        used = 500 * MIB
        gpu = Gpu(f"GPU-{uuid}", used, processes=processes, errors=errors or {})
        return FakeLibrary(gpu)

    return {
        "wsl": one({_OWN: None}),
        "old wsl": one({}, errors={PROCESSES: pynvml.NVML_ERROR_NOT_SUPPORTED}),
        "container": one({2**22 + 1: 300 * MIB}),
        "jetson": FakeLibrary(
            errors={"nvmlInitWithFlags": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}
        ),
        "newer jetson": one(
            {},
            errors={
                PROCESSES: pynvml.NVML_ERROR_NOT_SUPPORTED,
                "nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_NOT_SUPPORTED,
            },
        ),
        "no permission": one({}, errors={PROCESSES: pynvml.NVML_ERROR_NO_PERMISSION}),
        "mismatch": FakeLibrary(
            errors={"nvmlInitWithFlags": pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH}
        ),
        "lost": one(
            {},
            errors={
                PROCESSES: pynvml.NVML_ERROR_GPU_IS_LOST,
                "nvmlDeviceGetMemoryInfo": pynvml.NVML_ERROR_GPU_IS_LOST,
            },
        ),
        "another card": FakeLibrary(Gpu("GPU-other", processes={_OWN: MIB})),
        "well": one({_OWN: 300 * MIB}),
        "old driver": one({}, errors={PROCESSES: pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}),
    }


#: Words that each of them must be told by.
WORDS: Final = {
    "wsl": "NVML lists this process without its bytes, as under WSL",
    "old wsl": "NVML says 'Not Supported': NVML does not count here, as under WSL",
    "container": "NVML does not list this process, as in a container",
    "jetson": "NVML says 'NVML Shared Library Not Found': there is no NVML library",
    "newer jetson": "NVML says 'Not Supported'",
    "no permission": "NVML says 'Insufficient Permissions': NVML may not be asked",
    "mismatch": "NVML's library and the kernel's driver differ; restart machine",
    "lost": "NVML says 'GPU is lost': the card is lost; restart the machine",
    "another card": "NVML does not know the card that torch uses",
    "old driver": "pyNVML version does not match the NVML lib version",
}
#: Those that still tell what the card holds.
TELL_THE_CARD: Final = ("wsl", "old wsl", "container", "no permission", "old driver")
