"""Operators that work number by number."""

from __future__ import annotations

import torch

from pytest_gpumem.devices.simulated.accumulation import with_accumulation
from pytest_gpumem.devices.simulated.kernel_types import HALVES, lacking
from pytest_gpumem.devices.simulated.operators.composing import (
    into_out,
    on_cpu_alone,
    only,
    packing,
)
from pytest_gpumem.devices.simulated.operators.registry import register

register(
    "add",
    around=with_accumulation,
    source="input_buffer.cpp, accumulate",
)
# C++ makes a buffer on the host.
register("log_sigmoid", composed=into_out, source="Activation.cpp, log_sigmoid_out")
register(
    "mish_backward silu_backward",
    has_cuda_kernel=True,
    source="native_functions.yaml, CUDA beside CompositeImplicitAutograd",
)
register(
    "angle",
    lacks=lacking("angle_cuda", HALVES),
    source="cuda/UnaryComplexKernels.cu, angle_kernel_cuda",
)
# The CPU's kernel writes past the strides of ``out=``.
register("gelu", compute=packing, source="cpu/Activation.cpp, GeluKernelImpl")
for _name in ("igamma", "igammac"):
    register(
        _name,
        lacks=lacking(f"{_name}_cuda", HALVES),
        source=f"cuda/IGammaKernel.cu, {_name}_kernel_cuda",
    )
register(
    "_add_relu",
    composed=on_cpu_alone,
    source="native_functions.yaml, dispatch: CPU",
)


def _abs(source: torch.Tensor) -> torch.Tensor:
    """``abs``: a card has it of truth values, too."""
    return source.clone() if source.dtype is torch.bool else torch.abs(source)


register("abs", compute=only(_abs), source="cuda/AbsKernel.cu, abs_kernel_cuda")
