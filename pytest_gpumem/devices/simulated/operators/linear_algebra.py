"""Products, decompositions and norms."""

from __future__ import annotations

import math

import torch

from pytest_gpumem.devices.simulated.operators.checks import iterated
from pytest_gpumem.devices.simulated.operators.composing import (
    into_out,
    landing,
    on_host,
    only,
)
from pytest_gpumem.devices.simulated.operators.registry import Cast, register

_aten = torch.ops.aten

_NO_CHECK = "native_functions.yaml, device_check: NoCheck"
_HANDLE = "CUDABlas.cpp, getCurrentCUDABlasHandle"
_TO_LOWER = "autocast_mode.h, AT_FORALL_LOWER_PRECISION_FP"
_TO_FLOAT32 = "autocast_mode.h, AT_FORALL_FP32"
_TO_WIDEST = "autocast_mode.h, AT_FORALL_PROMOTE"
_COMPOSED = "BatchLinearAlgebra.cpp and LinearAlgebra.cpp: helpers by tensor.options()"

register(
    "addmm addmv addr baddbmm bmm mm mv",
    uses_cublas=True,
    autocast=Cast("lower"),
    source=f"{_HANDLE}; {_TO_LOWER}",
)
register(
    "dot vdot",
    uses_cublas=True,
    autocast=Cast("widest"),
    source=f"{_HANDLE}; {_TO_WIDEST}",
)
register(
    "addbmm chain_matmul linalg_multi_dot matmul",
    autocast=Cast("lower"),
    source=_TO_LOWER,
)
register("bilinear cross tensordot", autocast=Cast("widest"), source=_TO_WIDEST)


def _linear(
    source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``linear``: for a subclass of tensors C++ adds the bias out of place."""
    count = source.dim()
    if bias is not None and count == 2:  # noqa: PLR2004  # rows
        return torch.addmm(bias, source, weight.t())
    shape = (*source.shape[:-1], weight.shape[0])
    if bias is not None and source.is_contiguous():
        rows = source.view(math.prod(source.shape[:-1]), source.shape[-1])
        return torch.addmm(bias, rows, weight.t()).view(shape)
    # ``should_fold``, for a weight that requires gradients.
    if count > 2 and weight.requires_grad and weight.dim() == 2:  # noqa: PLR2004  # rows
        rows = source.reshape(-1, source.shape[-1]) if source.numel() else source
        product: torch.Tensor = rows.matmul(weight.t())
        product = _aten._unsafe_view.default(product, shape)
    else:
        product = source.matmul(weight.t())
    if bias is None:
        return product
    is_dual = torch.autograd.forward_ad._current_level >= 0  # no public way to ask
    return product.add(bias) if is_dual else product.add_(bias)


register(
    "linear",
    composed=only(_linear),
    autocast=Cast("lower"),
    source=f"Linear.cpp, linear; LinearAlgebra.cpp, should_fold; {_TO_LOWER}",
)

# -- decompositions -------------------------------------------------------------------

register(
    """
    inverse linalg_cholesky linalg_det linalg_eigvalsh linalg_inv linalg_ldl_factor
    linalg_lu_factor linalg_slogdet linalg_svdvals
    """,
    composed=into_out,
    source=_COMPOSED,
)
register("linalg_matrix_rank", composed=on_host, source=_COMPOSED)
register("linalg_matrix_norm", composed=landing, source=_COMPOSED)
# The tolerances that C++ makes for it are the host's.
register("linalg_pinv", takes_host=True, source=_COMPOSED)
register("vander", composed=on_host, source=_COMPOSED)

# -- norms and distances --------------------------------------------------------------

register(
    "norm",
    check=iterated,
    autocast=Cast("float32", ("Scalar", "ScalarOpt_dim")),
    source=f"{_NO_CHECK}; {_TO_FLOAT32}",
)
register(
    "dist renorm",
    check=iterated,
    autocast=Cast("float32"),
    source=f"{_NO_CHECK}; {_TO_FLOAT32}",
)
register("cdist pdist", autocast=Cast("float32"), source=_TO_FLOAT32)
