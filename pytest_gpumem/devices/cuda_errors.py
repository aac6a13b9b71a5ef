"""Errors of CUDA's runtime: their numbers, names and descriptions, and torch's error.

Source: ``driver_types.h`` of CUDA, ``cudaGetErrorName`` and ``cudaGetErrorString``.
"""

from __future__ import annotations

from typing import Final

import torch

from pytest_gpumem.allocator.versions import installed_version

#: Name and description of an error, by its number.
ERRORS: Final[dict[int, tuple[str, str]]] = {
    0: ("cudaSuccess", "no error"),
    1: ("cudaErrorInvalidValue", "invalid argument"),
    2: ("cudaErrorMemoryAllocation", "out of memory"),
    3: ("cudaErrorInitializationError", "initialization error"),
    100: ("cudaErrorNoDevice", "no CUDA-capable device is detected"),
    101: ("cudaErrorInvalidDevice", "invalid device ordinal"),
    201: ("cudaErrorDeviceUninitialized", "invalid device context"),
    400: ("cudaErrorInvalidResourceHandle", "invalid resource handle"),
    401: (
        "cudaErrorIllegalState",
        "the operation cannot be performed in the present state",
    ),
    700: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    701: (
        "cudaErrorLaunchOutOfResources",
        "too many resources requested for launch",
    ),
    710: ("cudaErrorAssert", "device-side assert triggered"),
    712: (
        "cudaErrorHostMemoryAlreadyRegistered",
        "part or all of the requested memory range is already mapped",
    ),
    713: (
        "cudaErrorHostMemoryNotRegistered",
        "pointer does not correspond to a registered memory region",
    ),
    719: ("cudaErrorLaunchFailure", "unspecified launch failure"),
    801: ("cudaErrorNotSupported", "operation not supported"),
    900: (
        "cudaErrorStreamCaptureUnsupported",
        "operation not permitted when stream is capturing",
    ),
    901: (
        "cudaErrorStreamCaptureInvalidated",
        "operation failed due to a previous error during capture",
    ),
    904: ("cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"),
    907: (
        "cudaErrorCapturedEvent",
        "operation not permitted on an event last recorded in a capturing stream",
    ),
}
#: The start of an error of TorchScript's interpreter, which ends with the text of the
#: operator's error. Source: ``InterpreterStateImpl::handleError`` of
#: ``torch/csrc/jit/runtime/interpreter.cpp``.
INTERPRETER_FAILED: Final = (
    "The following operation failed in the TorchScript interpreter."
)
_NUMBERS: Final = {name: number for number, (name, _words) in ERRORS.items()}
#: Source: ``c10/cuda/CUDAMiscFunctions.cpp``, ``get_cuda_error_help``.
_HELP: Final = (
    "Search for `{name}' in https://docs.nvidia.com/cuda/cuda-runtime-api/"
    "group__CUDART__TYPES.html for more information."
)
_DEVICE_HELP: Final = "GPU device may be out of range, do you have enough GPUs?"
#: Errors that a kernel can cause, and that a later call then reports. Source:
#: ``get_cuda_async_error_suffix`` of the same file.
_OF_KERNELS: Final = frozenset(
    {"cudaErrorIllegalAddress", "cudaErrorAssert", "cudaErrorLaunchFailure"}
)


def cuda_error(name: str) -> torch.AcceleratorError:
    """Return torch's error for a failed call of CUDA.

    Args:
        name: The error's name in CUDA's headers, such as ``cudaErrorMemoryAllocation``.

    Returns:
        The error, with its number in ``error_code``, as the C++ code of the installed torch
        makes it.
        Source: ``torch/csrc/Exceptions.h``.
    """
    number = _NUMBERS[name]
    version = installed_version()
    is_device = name == "cudaErrorInvalidDevice"
    hint = _DEVICE_HELP if is_device else _HELP.format(name=name)
    hint = f"{hint}\n" if version.explains_errors else ""
    end = version.kernel_error_end if name in _OF_KERNELS else version.error_end
    error = torch.AcceleratorError(f"CUDA error: {ERRORS[number][1]}\n{hint}{end}")
    error.error_code = number  # type: ignore[attr-defined]  # torch sets it only in C++
    return error
