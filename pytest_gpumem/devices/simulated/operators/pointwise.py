"""Operators that work number by number."""

from __future__ import annotations

import torch

from pytest_gpumem.devices.simulated.accumulation import with_accumulation
from pytest_gpumem.devices.simulated.kernel_types import HALVES, lacking
from pytest_gpumem.devices.simulated.operators.checks import iterated
from pytest_gpumem.devices.simulated.operators.composing import (
    into_out,
    on_cpu_alone,
    only,
    packing,
)
from pytest_gpumem.devices.simulated.operators.registry import Cast, register

_NO_CHECK = "native_functions.yaml, device_check: NoCheck"
_TO_FLOAT32 = "autocast_mode.h, AT_FORALL_FP32"
_TO_WIDEST = "autocast_mode.h, AT_FORALL_PROMOTE"

register(
    "add",
    check=iterated,
    around=with_accumulation,
    source=f"{_NO_CHECK}; input_buffer.cpp, accumulate",
)
register(
    """
    __and__ __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __or__
    __rshift__ __xor__ arctan2 bitwise_and bitwise_left_shift bitwise_or
    bitwise_right_shift bitwise_xor clamp clamp_max clamp_min copysign div eq
    fake_quantize_per_channel_affine fake_quantize_per_tensor_affine fill floor_divide
    fmax fmin fmod ge glu gt heaviside hypot isfinite le lerp logical_and
    logical_or logical_xor lt maximum minimum mul mvlgamma ne polygamma remainder rsub
    special_chebyshev_polynomial_t special_chebyshev_polynomial_u
    special_chebyshev_polynomial_v special_chebyshev_polynomial_w
    special_hermite_polynomial_h special_hermite_polynomial_he
    special_laguerre_polynomial_l special_legendre_polynomial_p
    special_shifted_chebyshev_polynomial_t special_shifted_chebyshev_polynomial_u
    special_shifted_chebyshev_polynomial_v special_shifted_chebyshev_polynomial_w
    special_xlog1py special_xlogy special_zeta sub threshold true_divide where xlogy
    zero
    """,
    check=iterated,
    source=_NO_CHECK,
)
register(
    "addcdiv addcmul atan2",
    check=iterated,
    autocast=Cast("widest"),
    source=f"{_NO_CHECK}; {_TO_WIDEST}",
)
register(
    "pow",
    check=iterated,
    autocast=Cast("float32", ("Scalar", "Tensor_Scalar", "Tensor_Tensor")),
    source=f"{_NO_CHECK}; {_TO_FLOAT32}",
)
register(
    """
    acos asin cosh erfinv exp expm1 log log10 log1p log2 reciprocal rsqrt sinh softplus
    tan
    """,
    autocast=Cast("float32"),
    source=_TO_FLOAT32,
)
register(
    "prelu",
    autocast=Cast("lower"),
    source="autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP",
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
    check=iterated,
    lacks=lacking("angle_cuda", HALVES),
    source=f"cuda/UnaryComplexKernels.cu, angle_kernel_cuda; {_NO_CHECK}",
)
# The CPU's kernel writes past the strides of ``out=``.
register("gelu", check=iterated, compute=packing, source=_NO_CHECK)
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
