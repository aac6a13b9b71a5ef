"""Operators that work number by number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_gpumem.devices.simulated.accumulation import (
    taking_over,
    with_accumulation,
)
from pytest_gpumem.devices.simulated.kernel_types import HALVES, lacking
from pytest_gpumem.devices.simulated.operators.composing import (
    into_out,
    on_cpu_alone,
    only,
    packing,
)
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Results,
    Sized,
    Temporary,
    copy_of,
    is_number,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, Step


register(
    "add",
    around=with_accumulation,
    source="input_buffer.cpp, accumulate",
)
register(
    "logical_and logical_or",
    around=taking_over,
    source="FunctionsManual.cpp, evenly_distribute_backward",
)
# C++ makes a buffer on the host.
register("log_sigmoid", composed=into_out, source="Activation.cpp, log_sigmoid_out")


def _without_buffer(_call: Call) -> Iterator[Step]:
    """The buffer that the CPU's kernel fills is empty on a card."""
    yield Results(0)
    yield Sized(1, 0)


register(
    "log_sigmoid_forward",
    requests=_without_buffer,
    source="cuda/Activation.cpp, log_sigmoid_forward_out_cuda",
)


def _by_sizes(call: Call) -> Iterator[Step]:
    """``self.abs() == inf``; whole numbers are finite."""
    operand = call["self"]
    if operand.dtype.is_floating_point:
        yield copy_of(operand)


register("isinf", requests=_by_sizes, source="TensorCompare.cpp, isinf")


def _with_numbers(call: Call) -> Iterator[Step]:
    """A number is a tensor of the card: C++ makes it by the options of another one."""
    for name in ("self", "other"):
        if is_number(call.get(name)):
            yield Temporary(call[name].itemsize)


register(
    "where",
    requests=_with_numbers,
    source="TensorCompare.cpp, where; FunctionsManual.cpp, scalar_tensor",
)
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
