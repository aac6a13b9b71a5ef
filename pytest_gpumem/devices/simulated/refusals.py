"""Features that cannot be simulated; one error class refuses each by its name.

A refusal is better than a crash in C++, which cannot call CUDA, and better than a silent
run on the host, which would prove nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch

from pytest_gpumem.errors import NoValuesError, UnsupportedOnSimulatedDeviceError
from pytest_gpumem.stacks import calling_frame, frames_from, short_path

if TYPE_CHECKING:
    from pytest_gpumem.devices.patches import PatchSet

_REAL: Final = "run this on a real card"
_KERNEL: Final = "use the code path that does not need it, or run this on a real card"

#: Advice for the user, by the feature's public name.
ADVICE: Final[dict[str, str]] = {
    "torch.cuda.graph(check_input_liveness=True)": "leave it False",
    "CUDAGraph.debug_dump": "a simulated card makes no CUDA graph to look at",
    "CUDAGraph.raw_cuda_graph": "a simulated card makes no CUDA graph to look at",
    "torch._C._cuda_getCheckpointState": "capture each graph once, in a pool of its own",
    "torch.accelerator.Graph": "use torch.cuda.CUDAGraph",
    "torch.cuda.CUDAPluggableAllocator": "keep PyTorch's own allocator",
    "torch.cuda.change_current_allocator": "keep PyTorch's own allocator",
    "torch.cuda.caching_allocator_disabled": "keep PyTorch's own allocator",
    "Generator.graphsafe_get_state": "use get_state()",
    "Generator.graphsafe_set_state": "use set_state()",
    "tensor.data = of another device, of a tensor computed with gradients": (
        "use tensor.to(device), or detach the tensor first"
    ),
    "torch.backends.cuda.cublas_workspace_size of another size": (
        "set CUBLAS_WORKSPACE_CONFIG before the process starts"
    ),
    "torch.backends.cuda.cublaslt_workspace_size": _REAL,
    "torch.cuda.ExternalStream": "use torch.cuda.Stream",
    "torch.cuda.get_stream_from_external": "use torch.cuda.Stream",
    "torch.cuda.GreenContext": _REAL,
    "torch.cuda.jiterator": (
        "write the operation with torch's operators, or keep no values: "
        "--gpu-values=none"
    ),
    "torch.cuda.nccl.init_rank": "use torch.distributed, whose groups may be of NCCL",
    "a functional send or receive of torch.distributed": (
        "use torch.distributed.isend and irecv"
    ),
    "torch.cuda._sanitizer.enable_cuda_sanitizer": _REAL,
    "torch.cuda.gds": "read the file on the host",
    "torch.cuda.tunable": _REAL,
    "torch.export.export": "export the module while it is on the CPU",
    "torch._dynamo.explain": "explain the function with tensors on the CPU",
    "torch.func.linearize": "use torch.func.jvp, or linearize with tensors on the CPU",
    "FakeTensorMode.from_tensor": "make the fake tensors while the module is on the CPU",
    "TorchScript code that asks for devices": (
        "call the module or function that it was made from"
    ),
    "a copy between devices in torch.jit.trace": (
        "move the module and its inputs before it is traced"
    ),
    "a TorchScript archive of several devices": "move the module to one device first",
    "tensor.__cuda_array_interface__": "pass on tensor.cpu() instead",
    "tensor.__dlpack__": "pass on tensor.cpu() instead",
    "a tensor of symbolic size": "trace the program with tensors on the CPU",
    "resizing a tensor that was sent to another process": "send a clone of it",
    "torch.cuda._compile_kernel": _KERNEL,
    "a Triton kernel": _KERNEL,
    "dropout or a mask of an attention kernel that is called by itself": (
        "use torch.nn.functional.scaled_dot_product_attention"
    ),
    "torch.nn.attention.bias.causal_lower_right with dropout, two widths of heads, or "
    "more queries than keys": "pass a mask of booleans",
    "dropout, a mask, shared heads or two widths in cuDNN's attention": (
        "allow another kernel: torch.nn.attention.sdpa_kernel"
    ),
    "flex_attention": "use torch.nn.functional.scaled_dot_product_attention",
    "a Fourier transform in half precision": "transform in float32, as source.float()",
    "rrelu in half precision": "compute it in float32, as source.float()",
    "a tensor of oneDNN (MKL-DNN), as torch.jit.optimize_for_inference makes": (
        "use torch.jit.freeze alone, or optimise the module for the CPU"
    ),
    "a sparse tensor": "use a dense tensor, or keep this one on the CPU",
    "a quantized tensor": "keep it on the CPU, or use torch.ao.quantization's fake quantisation",
    "torch.autograd.profiler.emit_nvtx": "profile with torch.profiler",
    "torch.autocast without torch's header files": "install torch from its own wheel",
    "a nested tensor": "pad the tensors to one size, or keep them on the CPU",
    "a nested tensor while gradients are recorded": (
        "use torch.no_grad, or pad the tensors to one size"
    ),
    "a torch.compile backend that makes kernels": (
        'run with --gpu-compiled=eager (simulated_device(..., compiled="eager")), use '
        'backend="eager" or "aot_eager", or set TORCH_COMPILE_DISABLE=1: kernels for a '
        "card cannot run here"
    ),
}


def refused(feature: str) -> UnsupportedOnSimulatedDeviceError:
    """Return the error for a feature that cannot be simulated."""
    return UnsupportedOnSimulatedDeviceError(feature, ADVICE[feature])


def refuse(feature: str) -> NoReturn:
    """Raise the error for a feature that cannot be simulated.

    Raises:
        UnsupportedOnSimulatedDeviceError: Always.
    """
    raise refused(feature)


def refuse_layout(layout: torch.layout) -> NoReturn:
    """Raise the error for a tensor that is not strided.

    Raises:
        UnsupportedOnSimulatedDeviceError: Always.
    """
    if layout is torch._mkldnn:  # type: ignore[attr-defined]  # torch's stubs lack it
        refuse(
            "a tensor of oneDNN (MKL-DNN), as torch.jit.optimize_for_inference makes"
        )
    refuse("a sparse tensor")


#: Directories of code that reads values on behalf of its caller.
_BETWEEN: Final = tuple(
    str(Path(file).parents[level]) + os.sep
    for file, level in ((torch.__file__, 0), (__file__, 2))
)


def refuse_value(operation: str) -> NoReturn:
    """Raise the error of a card without values, and name the code that reads a value.

    Raises:
        NoValuesError: Always.
    """
    for frame in frames_from(calling_frame()):
        code = frame.f_code
        if not code.co_filename.startswith(_BETWEEN):
            file = short_path(code.co_filename)
            place = f"{file}:{frame.f_lineno} in {code.co_name}"
            raise NoValuesError(operation, place)
    raise NoValuesError(operation)


def refusing(feature: str) -> Any:
    """Return a function that refuses all arguments."""

    def refuse_it(*_args: Any, **_kwargs: Any) -> NoReturn:
        refuse(feature)

    return refuse_it


def refusing_class(feature: str) -> type:
    """Return a class that cannot be instantiated, for use in ``isinstance``."""
    name = feature.rpartition(".")[2]
    return type(name, (), {"__init__": refusing(feature), "__doc__": ADVICE[feature]})


#: Refused functions of ``torch._C``, with the names of torch 2.8 to 2.15.
C_REFUSALS: Final[dict[str, Any]] = {
    "_cuda_changeCurrentAllocator": refusing("torch.cuda.change_current_allocator"),
    "_cuda_cudaHostAllocator": refusing("torch.cuda.CUDAPluggableAllocator"),
    "_cuda_customAllocator": refusing("torch.cuda.CUDAPluggableAllocator"),
    "_cuda_getAllocator": refusing("torch.cuda.CUDAPluggableAllocator"),
    "_cuda_CUDAAllocator": refusing_class("torch.cuda.CUDAPluggableAllocator"),
    "_CUDAGreenContext": refusing_class("torch.cuda.GreenContext"),
    "_acceleratorGraph": refusing_class("torch.accelerator.Graph"),
    **{
        name: refusing("torch._C._cuda_getCheckpointState")
        for name in (
            "_cuda_checkPoolLiveAllocations",
            "_cuda_getCheckpointState",
            "_cuda_setCheckpointPoolState",
        )
    },
    "_cuda_setCublasWorkspaceSize": refusing(
        "torch.backends.cuda.cublas_workspace_size of another size"
    ),
    "_cuda_getCublasLtWorkspaceSize": refusing(
        "torch.backends.cuda.cublaslt_workspace_size"
    ),
    "_cuda_setCublasLtWorkspaceSize": refusing(
        "torch.backends.cuda.cublaslt_workspace_size"
    ),
    "_cuda_getStreamFromExternal": refusing("torch.cuda.get_stream_from_external"),
    **{
        name: refusing("torch.cuda.nccl.init_rank")
        for name in ("_nccl_unique_id", "_nccl_init_rank")
    },
    **{
        name: refusing("torch.cuda.gds")
        for name in (
            "_gds_register_buffer",
            "_gds_deregister_buffer",
            "_gds_register_handle",
            "_gds_deregister_handle",
            "_gds_load_storage",
            "_gds_save_storage",
        )
    },
}

#: Queries of ``torch.cuda.tunable`` that return False, because it is off.
_TUNABLE_IS: Final = (
    "_cuda_tunableop_is_enabled",
    "_cuda_record_untuned_is_enabled",
    "_cuda_tunableop_wildcard_fallback_is_enabled",
)
_TUNABLE: Final = (
    "_cuda_tunableop_enable",
    "_cuda_tunableop_tuning_enable",
    "_cuda_tunableop_tuning_is_enabled",
    "_cuda_record_untuned_enable",
    "_cuda_tunableop_set_max_tuning_duration",
    "_cuda_tunableop_get_max_tuning_duration",
    "_cuda_tunableop_set_max_tuning_iterations",
    "_cuda_tunableop_get_max_tuning_iterations",
    "_cuda_tunableop_set_filename",
    "_cuda_tunableop_get_filename",
    "_cuda_tunableop_get_results",
    "_cuda_tunableop_get_validators",
    "_cuda_tunableop_read_file",
    "_cuda_tunableop_write_file",
    "_cuda_tunableop_write_file_on_exit",
    "_cuda_tunableop_set_rotating_buffer_size",
    "_cuda_tunableop_get_rotating_buffer_size",
    "_cuda_tunableop_set_numerical_check_tolerances",
    "_cuda_tunableop_wildcard_fallback_enable",
    "_cuda_tunableop_clear_all",
    "_cuda_tunableop_get_cublaslt_requested_algo_count",
    "_cuda_tunableop_set_cublaslt_requested_algo_count",
    "_cuda_tunableop_push_dynamic_dims_mask",
    "_cuda_tunableop_pop_dynamic_dims_mask",
)
C_REFUSALS.update({name: refusing("torch.cuda.tunable") for name in _TUNABLE})
C_REFUSALS.update(dict.fromkeys(_TUNABLE_IS, lambda: False))

#: Refused classes of ``torch.cuda``, and the module that defines each.
CLASSES: Final[dict[str, str]] = {
    "CUDAPluggableAllocator": "memory",
    "ExternalStream": "streams",
    "GreenContext": "green_contexts",
}


def patch_sanitizer(patches: PatchSet) -> None:
    """Refuse CUDA's stream sanitizer, whose callbacks nothing on a simulated card calls."""
    from torch.cuda import _sanitizer

    feature = "torch.cuda._sanitizer.enable_cuda_sanitizer"
    patches.set(_sanitizer.CUDASanitizer, "enable", refusing(feature))
