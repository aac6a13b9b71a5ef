"""The bytes that NVML counts on torch's cards, per process and per card.

``pynvml`` (nvidia-ml-py) queries NVIDIA's driver. This module imports it late and never
raises in its caller. If a value is not available, it returns the reason.

Note [Which card NVML means]
NVML numbers all cards of the machine by their PCI bus. CUDA numbers only the cards that
``CUDA_VISIBLE_DEVICES`` makes visible, with the fastest first unless
``CUDA_DEVICE_ORDER`` is ``PCI_BUS_ID``. The two indices of a card can therefore differ.
Both libraries know the UUID of a card and of a MIG instance.
``torch.cuda.get_device_properties`` returns the UUID that CUDA uses, for every syntax of
the variable. If this is the UUID of a card in MIG mode, the instance that counts this
process is used.
Source: CUDA C++ Programming Guide, "CUDA Environment Variables"; CUDA Driver API,
``cuDeviceGetUuid``; NVML API Reference, ``nvmlDeviceGetHandleByUUID``.
"""

from __future__ import annotations

import inspect
import os
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.patches import PatchSet
    from pytest_gpumem.records.incidents import Process

#: Explanations of NVML's error codes for a user who runs tests.
#: Source: ``nvmlReturn_t`` of ``nvml.h``.
_WORDS: Final = {
    3: "NVML does not count here, as under WSL, on a Jetson or a vGPU",
    4: "NVML may not be asked here; run with more permissions",
    6: "NVML does not know the card that torch uses",
    9: "NVIDIA's driver is not loaded",
    12: "there is no NVML library, as on a Jetson or without NVIDIA's driver",
    13: "the driver is too old for nvidia-ml-py",
    15: "the card is lost; restart the machine",
    18: "NVML's library and the kernel's driver differ; restart machine or container",
}
_NOT_FOUND: Final = (2, 6)
_MISSING: Final = "nvidia-ml-py is not installed; pip install nvidia-ml-py"
_NOT_LISTED: Final = (
    "NVML does not list this process, as in a container that has its own process ids; "
    "start the container with the host's (--pid=host)"
)
_NO_BYTES: Final = (
    "NVML lists this process without its bytes, as under WSL and Windows (WDDM)"
)


class MemoryInfo(NamedTuple):
    """``nvmlMemory_t``: bytes of a card."""

    total: int
    free: int
    used: int


def memory_info(free: int, total: int) -> MemoryInfo:
    """Return the bytes of a card from its free and its total bytes."""
    return MemoryInfo(total, free, total - free)


class Reading(NamedTuple):
    """The bytes that NVML counts at one time.

    Attributes:
        process_bytes: This process's bytes on the card; None if NVML does not report
            them.
        card_bytes: All processes' bytes on the card, or on the MIG instance that torch
            uses; None if NVML does not report them.
        why: The reason why ``process_bytes`` is None; empty if it is not None.
    """

    process_bytes: int | None
    card_bytes: int | None
    why: str = ""


class CardCount:
    """NVML's count on one card.

    Args:
        index: CUDA's index of the card.
        has_context: Returns whether this process has a context on the card; NVML does
            not list a process without one.
        find: Returns NVML's handle of the card.

    This class may be used from several threads at once, as NVML is thread-safe.
    """

    def __init__(
        self,
        index: int,
        has_context: Callable[[], bool],
        find: Callable[[Any, int], Any] | None = None,
    ) -> None:
        self._index: Final = index
        self._find: Final = find_handle if find is None else find
        self._has_context: Final = has_context
        self._handle: Any = None

    def read(self) -> Reading:
        """Return the present bytes; never raises."""
        try:
            import pynvml
        except ImportError:
            return Reading(None, None, _MISSING)
        try:
            if self._handle is None:
                self._handle = self._find(pynvml, self._index)
            handle = self._handle
            card_bytes = _used_bytes(pynvml, handle)
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except Exception as error:  # noqa: BLE001  # a failed measurement must not fail a test
            handle, self._handle = self._handle, None
            card_bytes = None if handle is None else _used_bytes(pynvml, handle)
            return Reading(None, card_bytes, in_words(error))
        own = [each.usedGpuMemory for each in running if each.pid == os.getpid()]
        if own and own[0] is not None:
            return Reading(int(own[0]), card_bytes)
        if own:
            return Reading(None, card_bytes, _NO_BYTES)
        if self._has_context():
            return Reading(None, card_bytes, _NOT_LISTED)
        return Reading(0, card_bytes)


def in_words(error: Exception) -> str:
    """Return an explanation of an NVML error, with NVML's own message."""
    words = _WORDS.get(getattr(error, "value", 0))
    return f"NVML says {str(error) or repr(error)!r}" + (f": {words}" if words else "")


def why_uncounted() -> str:
    """Return why NVML cannot count processes on this machine; empty if it can.

    This queries all cards of the machine, by NVML's index, and does not need CUDA.
    """
    try:
        import pynvml
    except ImportError:
        return _MISSING
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            if _is_mig(pynvml, handle):
                continue  # each MIG instance counts its own processes
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if any(each.usedGpuMemory is None for each in running):
                return _NO_BYTES
    except Exception as error:  # noqa: BLE001  # any error becomes the reason
        return in_words(error)
    return ""


def find_handle(pynvml: Any, index: int) -> Any:
    """Return NVML's handle of the card or MIG instance that torch uses.

    See Note [Which card NVML means]. Initialises NVML, and CUDA if necessary.

    Args:
        pynvml: The module.
        index: CUDA's index of the card.

    Raises:
        NVMLError: NVML cannot be used, or does not know the card.
    """
    import torch

    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(index).uuid
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError as error:
        if error.value not in _NOT_FOUND:
            raise
        return pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
    return _own_instance(pynvml, handle) if _is_mig(pynvml, handle) else handle


def _is_mig(pynvml: Any, handle: Any) -> bool:
    try:
        current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:
        return False  # the card has no MIG mode
    return bool(current)


def _own_instance(pynvml: Any, card: Any) -> Any:
    """Return the MIG instance that counts this process, or else the card."""
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, number)
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(instance)
        except pynvml.NVMLError:
            continue  # not every index has an instance
        if any(each.pid == os.getpid() for each in running):
            return instance
    return card


def _used_bytes(pynvml: Any, handle: Any) -> int | None:
    """Return a card's used bytes without the effect of a budget, or None."""
    ask = inspect.unwrap(pynvml.nvmlDeviceGetMemoryInfo)
    try:
        return int(ask(handle).used)
    except Exception:  # noqa: BLE001  # a failed measurement must not fail a test
        return None


def other_processes(index: int) -> tuple[Process, ...]:
    """Return the other processes on a card, the one with the most bytes first.

    Args:
        index: CUDA's index of the card.

    Returns:
        The processes; empty if NVML does not report them.
    """
    from pytest_gpumem.records.incidents import Process

    try:
        import pynvml
    except ImportError:
        return ()
    try:
        handle = find_handle(pynvml, index)
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except Exception:  # noqa: BLE001  # a failed measurement must not fail a test
        return ()
    found = [
        Process(each.pid, _process_name(each.pid), each.usedGpuMemory or 0)
        for each in running
        if each.pid != os.getpid()
    ]
    return tuple(sorted(found, key=lambda each: -each.nbytes))


def _process_name(pid: int) -> str:
    """Return a process's name from the system; empty if it is not available."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def cap_free_memory(
    module: Any, patches: PatchSet, shared: Callable[[int, int, int], tuple[int, int]]
) -> None:
    """Make NVML's free memory of a real card agree with the card's budget.

    Args:
        module: The imported ``pynvml``.
        patches: The patches to which the replacement is added.
        shared: Takes CUDA's index, free and total bytes; returns free and total bytes
            under the budget.
    """
    original = module.nvmlDeviceGetMemoryInfo

    @wraps(original)
    def memory(handle: Any, version: Any = None) -> Any:
        info = original(handle) if version is None else original(handle, version)
        index = _cuda_index(module.nvmlDeviceGetUUID(handle))
        if index is None:
            return info
        return memory_info(*shared(index, info.free, info.total))

    patches.set(module, "nvmlDeviceGetMemoryInfo", memory)


def _cuda_index(nvml_uuid: str | bytes) -> int | None:
    """Return CUDA's index of a card; None if torch does not see the card."""
    import torch

    text = nvml_uuid.decode() if isinstance(nvml_uuid, bytes) else nvml_uuid
    bare = text.removeprefix("GPU-").removeprefix("MIG-")
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == bare:
            return index
    return None
