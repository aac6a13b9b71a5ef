"""The errors that real machines raise for want of memory, and one that is no OOM.

Each has the class, the one argument and the text of the real thing, with the card's
figures of that moment, and leaves the card in the state that the real thing does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from pytest_gpumem.allocator.oom_text import cuda_error_text, format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices import Device

#: Set on every error made here, to know it again.
MARK: Final = "_gpumem_injected"

#: The sentence that only the CUDA allocator has, and its last words.
_PROCESS: Final = re.compile(
    r"(Process \d+ has|Including non-PyTorch memory, this process has) .*? in use\. "
)
_TAIL: Final = re.compile(r" If reserved but unallocated memory is large .*")


@dataclass(frozen=True, slots=True)
class Failure:
    """An allocation that is to fail.

    Attributes:
        device: The cards.
        index: The card.
        nbytes: Bytes asked for.
    """

    device: Device
    index: int
    nbytes: int

    def native_text(self) -> str:
        """Fail the request as the caching allocator does; return its words."""
        return self.device.fail_allocation(self.index, self.nbytes)


def make_error(flavour: str, failure: Failure) -> Exception | None:
    """Return the error of a flavour; None for the native one, the device's own.

    Args:
        flavour: One of ``model.rules.FLAVOURS``.
        failure: The allocation.
    """
    if flavour == "native":
        return None
    error = _MAKERS[flavour](failure)
    setattr(error, MARK, True)
    return error


def is_injected(error: BaseException) -> bool:
    """Tell whether an error was made here."""
    return getattr(error, MARK, False)


def _legacy(failure: Failure) -> Exception:
    """Torch before 1.13, and TorchScript's interpreter today."""
    return RuntimeError(failure.native_text())


def _async(failure: Failure) -> Exception:
    """Source: ``c10/cuda/CUDAMallocAsyncAllocator.cpp``."""
    device, index = failure.device, failure.index
    free, total = device.mem_get_info(index)
    used = device.memory_stats(index).get("allocated_bytes.all.current", 0)
    limit = device.budget(index) or total
    return torch.OutOfMemoryError(
        f"Allocation on device {index} would exceed allowed memory. (out of memory)\n"
        f"Currently allocated     : {format_bytes(used)}\n"
        f"Requested               : {format_bytes(failure.nbytes)}\n"
        f"Device limit            : {format_bytes(total)}\n"
        f"Free (according to CUDA): {format_bytes(free)}\n"
        "PyTorch limit (set by user-supplied memory fraction)\n"
        f"                        : {format_bytes(limit)}"
    )


def _cuda_error(text: str, code: str) -> Exception:
    """The class is torch's since 2.8."""
    return torch.AcceleratorError(cuda_error_text(text, code))


def _driver(_failure: Failure) -> Exception:
    return _cuda_error("out of memory", "cudaErrorMemoryAllocation")


def _not_oom(_failure: Failure) -> Exception:
    return _cuda_error("device-side assert triggered", "cudaErrorAssert")


def _cublas(_failure: Failure) -> Exception:
    """Source: ``aten/src/ATen/cuda/CUDAContextLight.h``, ``TORCH_CUDABLAS_CHECK``."""
    return RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    )


def _cudnn(_failure: Failure) -> Exception:
    """Source: ``aten/src/ATen/cudnn/Exceptions.h``, ``AT_CUDNN_CHECK``."""
    return RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


def _cudnn_unsupported(_failure: Failure) -> Exception:
    """What cuDNN says where no engine fits into its workspace; same source."""
    return RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed "
        "in a non-contiguous input."
    )


def _nvml(failure: Failure) -> Exception:
    """The allocator's look at other processes fails while it writes its text.

    Source: ``reportProcessMemoryInfo`` in ``c10/cuda/CUDACachingAllocator.cpp``; it
    comes after the caches are flushed and before ``num_ooms`` counts.
    """
    failure.device.empty_cache()
    return RuntimeError(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/'
        'CUDACachingAllocator.cpp":1131, please report a bug to PyTorch. '
    )


def _hip(failure: Failure) -> Exception:
    """The same allocator, translated by hipify."""
    text = failure.native_text().replace("CUDA out of memory", "HIP out of memory")
    return torch.OutOfMemoryError(
        text.replace("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    )


def _xpu(failure: Failure) -> Exception:
    """Source: ``c10/xpu/XPUCachingAllocator.cpp``."""
    text = failure.native_text().replace("CUDA out of memory", "XPU out of memory")
    text = _PROCESS.sub("", text)
    return torch.OutOfMemoryError(
        _TAIL.sub(
            " Please use `empty_cache` to release all unoccupied cached memory.", text
        )
    )


def _mps(failure: Failure) -> Exception:
    """Source: ``aten/src/ATen/mps/MPSAllocator.mm``."""
    device, index = failure.device, failure.index
    _free, total = device.mem_get_info(index)
    used = device.memory_stats(index).get("reserved_bytes.all.current", 0)
    limit = device.budget(index) or total
    return RuntimeError(
        f"MPS backend out of memory (MPS allocated: {format_bytes(used)}, other "
        f"allocations: {format_bytes(0)}, max allowed: {format_bytes(limit)}). Tried to "
        f"allocate {format_bytes(failure.nbytes)} on private pool. Use "
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
        "allocations (may cause system failure)."
    )


def _host(failure: Failure) -> Exception:
    """Source: ``c10/core/impl/alloc_cpu.cpp``."""
    return RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
        f"allocate memory: you tried to allocate {failure.nbytes} bytes. Error code 12 "
        "(Cannot allocate memory)"
    )


_MAKERS: Final[dict[str, Callable[[Failure], Exception]]] = {
    "legacy": _legacy,
    "async": _async,
    "driver": _driver,
    "cublas": _cublas,
    "cudnn": _cudnn,
    "cudnn-unsupported": _cudnn_unsupported,
    "nvml": _nvml,
    "hip": _hip,
    "xpu": _xpu,
    "mps": _mps,
    "host": _host,
    "not-oom": _not_oom,
}
#: Those that the caching allocator itself fails for: ``num_ooms`` counts them.
COUNTED: Final = frozenset({"native", "legacy", "hip", "xpu"})
