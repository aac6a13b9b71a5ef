"""The errors that real machines raise when memory runs out, and one that is not an OOM.

Each has the class, the single argument and the text of the real error, with the card's
figures at that moment, and leaves the card in the same state as the real error.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import torch

from pytest_gpumem.allocator.oom_text import format_bytes
from pytest_gpumem.devices.cuda_errors import cuda_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices import Device

#: The attribute that marks every error made here.
MARK: Final = "_gpumem_injected"
#: Flavours that the caching allocator itself raises; ``num_ooms`` counts them.
COUNTED: Final = frozenset({"native", "legacy", "hip", "xpu"})

#: The sentence and the ending that only the text of the CUDA allocator has.
_PROCESS: Final = re.compile(
    r"(Process \d+ has|Including non-PyTorch memory, this process has) .*? in use\. "
)
_TAIL: Final = re.compile(r" If reserved but unallocated memory is large .*")


def make_error(
    flavour: str, device: Device, index: int, nbytes: int
) -> Exception | None:
    """Return the error of a flavour; None for ``"native"``, which the device raises itself.

    The flavours are those of ``rules.rule.FLAVOURS``.
    """
    if flavour == "native":
        return None
    kind, text = _ERRORS.get(flavour, (RuntimeError, ""))
    error: Exception
    if flavour in _CUDA_ERRORS:
        error = cuda_error(_CUDA_ERRORS[flavour])
    elif not isinstance(text, str):
        error = kind(text(device, index, nbytes))
    else:
        free, total = device.mem_get_info(index)
        stats = device.memory_stats(index)
        figures = {
            "nbytes": nbytes,
            "free": free,
            "total": total,
            "allocated": stats.get("allocated_bytes.all.current", 0),
            "reserved": stats.get("reserved_bytes.all.current", 0),
            "limit": device.budget(index) or total,
            "nothing": 0,
        }
        words = {name: format_bytes(value) for name, value in figures.items()}
        error = kind(text.format(index=index, num_bytes=nbytes, **words))
    setattr(error, MARK, True)
    return error


def is_injected(error: BaseException) -> bool:
    """Tell whether ``make_error`` made an error."""
    return getattr(error, MARK, False)


def _native(device: Device, index: int, nbytes: int) -> str:
    """Fail the request as the caching allocator does; return its text."""
    return device.fail_allocation(index, nbytes)


def _nvml(device: Device, _index: int, _nbytes: int) -> str:
    """Fail as the allocator does when it cannot list other processes for its text.

    Source: ``reportProcessMemoryInfo`` in ``c10/cuda/CUDACachingAllocator.cpp``, which is
    called after the caches are flushed and before ``num_ooms`` is increased.
    """
    device.empty_cache()
    return (
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/'
        'CUDACachingAllocator.cpp":1131, please report a bug to PyTorch. '
    )


def _hip(device: Device, index: int, nbytes: int) -> str:
    """Fail as the caching allocator does after hipify has translated it for ROCm."""
    text = _native(device, index, nbytes)
    text = text.replace("CUDA out of memory", "HIP out of memory")
    return text.replace("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def _xpu(device: Device, index: int, nbytes: int) -> str:
    """Fail as XPU's allocator does. Source: ``c10/xpu/XPUCachingAllocator.cpp``."""
    text = _native(device, index, nbytes)
    text = text.replace("CUDA out of memory", "XPU out of memory")
    return _TAIL.sub(
        " Please use `empty_cache` to release all unoccupied cached memory.",
        _PROCESS.sub("", text),
    )


#: The CUDA runtime's error for each of these flavours.
_CUDA_ERRORS: Final = {
    "driver": "cudaErrorMemoryAllocation",
    # The launch needs more registers or shared memory than there are; the card's memory
    # is not short.
    "launch": "cudaErrorLaunchOutOfResources",
    "not-oom": "cudaErrorAssert",
}
#: Class and text of each other flavour.
_ERRORS: Final[
    dict[str, tuple[type[Exception], str | Callable[[Device, int, int], str]]]
] = {
    # torch before 1.13 raises this, and TorchScript's interpreter still does.
    "legacy": (RuntimeError, _native),
    # Source: c10/cuda/CUDAMallocAsyncAllocator.cpp.
    "async": (
        torch.OutOfMemoryError,
        "Allocation on device {index} would exceed allowed memory. (out of memory)\n"
        "Currently allocated     : {allocated}\n"
        "Requested               : {nbytes}\n"
        "Device limit            : {total}\n"
        "Free (according to CUDA): {free}\n"
        "PyTorch limit (set by user-supplied memory fraction)\n"
        "                        : {limit}",
    ),
    # Expandable segments found no free addresses, although memory is free. No cache is
    # flushed and ``num_ooms`` does not count it. Source: c10/cuda/driver_api.h,
    # C10_CUDA_DRIVER_CHECK.
    "address-space": (RuntimeError, "CUDA driver error: out of memory"),
    # Source: aten/src/ATen/cuda/CUDAContextLight.h, TORCH_CUDABLAS_CHECK.
    "cublas": (
        RuntimeError,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    # Source: aten/src/ATen/cudnn/Exceptions.h, AT_CUDNN_CHECK.
    "cudnn": (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    # No engine of cuDNN fits into the workspace. Source:
    # aten/src/ATen/cudnn/Exceptions.h.
    "cudnn-unsupported": (
        RuntimeError,
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed "
        "in a non-contiguous input.",
    ),
    # Source: aten/src/ATen/native/cuda/CuFFTUtils.h, CUFFT_CHECK.
    "cufft": (RuntimeError, "cuFFT error: CUFFT_ALLOC_FAILED"),
    # Source: aten/src/ATen/cuda/Exceptions.h, TORCH_CUSOLVER_CHECK.
    "cusolver": (
        RuntimeError,
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling "
        "`cusolverDnCreate(handle)`. If you keep seeing this error, you may use "
        "`torch.backends.cuda.preferred_linalg_library()` to try linear algebra operators "
        "with other supported backends. See https://pytorch.org/docs/stable/backends.html"
        "#torch.backends.cuda.preferred_linalg_library",
    ),
    # NCCL takes its buffers from the driver. Source:
    # torch/csrc/distributed/c10d/NCCLUtils.hpp, C10D_NCCL_CHECK; NCCL's include/checks.h.
    "nccl": (
        getattr(torch._C, "_DistBackendError", RuntimeError),  # noqa: SLF001  # torch.distributed is slow to import
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, "
        "unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Last error:\n"
        "Cuda failure 2 'out of memory'",
    ),
    # Source: Triton's third_party/nvidia/backend/driver.c, gpuAssert.
    "triton": (RuntimeError, "Triton Error [CUDA]: out of memory"),
    # CuPy has a memory pool of its own, and its error derives from MemoryError. Source:
    # CuPy's cupy/cuda/memory.pyx, OutOfMemoryError.
    "cupy": (
        MemoryError,
        "Out of memory allocating {num_bytes:,} bytes (allocated so far: 0 bytes).",
    ),
    "nvml": (RuntimeError, _nvml),
    "hip": (torch.OutOfMemoryError, _hip),
    "xpu": (torch.OutOfMemoryError, _xpu),
    # Source: aten/src/ATen/mps/MPSAllocator.mm.
    "mps": (
        RuntimeError,
        "MPS backend out of memory (MPS allocated: {reserved}, other allocations: "
        "{nothing}, max allowed: {limit}). Tried to allocate {nbytes} on private pool. "
        "Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for memory "
        "allocations (may cause system failure).",
    ),
    # Source: c10/core/impl/alloc_cpu.cpp.
    "host": (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate {num_bytes} bytes. Error code 12 (Cannot "
        "allocate memory)",
    ),
}
