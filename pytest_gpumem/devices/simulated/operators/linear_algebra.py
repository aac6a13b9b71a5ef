"""Products, decompositions and norms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import INTEGERS, lacking
from pytest_gpumem.devices.simulated.operators.composing import (
    into_out,
    landing,
    on_host,
    only,
    packing,
)
from pytest_gpumem.devices.simulated.operators.reductions import norming
from pytest_gpumem.devices.simulated.operators.registry import register

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.operators.registry import Kernel

_aten = torch.ops.aten

_HANDLE = "CUDABlas.cpp, getCurrentCUDABlasHandle"
_COMPOSED = "BatchLinearAlgebra.cpp and LinearAlgebra.cpp: helpers by tensor.options()"


def _as_wanted(func: Any) -> Kernel | None:
    """Compute products whose type is asked for: on a card sums are of single precision."""
    if "out_dtype" not in [each.name for each in func._schema.arguments]:
        return None
    inner = func.overloadpacket.default

    def compute(
        *args: Any, out_dtype: Any = None, out: Any = None, **options: Any
    ) -> Any:
        operands = [each for each in args if isinstance(each, torch.Tensor)]
        wanted = args[len(operands)] if out_dtype is None else out_dtype
        result = inner(*(each.to(wanted) for each in operands), **options)
        return result if out is None else out.resize_(result.shape).copy_(result)

    return compute


for _names, _kernel in (
    ("addmm mm", "addmm_cuda"),
    ("addmv mv", "addmv_impl_cuda"),
    ("baddbmm bmm", "baddbmm_cuda"),
):
    register(
        _names,
        uses_cublas=True,
        compute=_as_wanted,
        lacks=lacking(_kernel, INTEGERS),
        source=f"{_HANDLE}; cuda/Blas.cpp",
    )
register(
    "addr",
    uses_cublas=True,
    source=_HANDLE,
)
for _name in ("dot", "vdot"):
    register(
        _name,
        uses_cublas=True,
        lacks=lacking(_name, INTEGERS),
        source=f"{_HANDLE}; cuda/Blas.cpp, {_name}_cuda",
    )
register(
    "addbmm",
    resizes=True,
    lacks=lacking("addmm_cuda", INTEGERS),
    source="LinearAlgebra.cpp, addbmm_impl_",
)


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
    source="Linear.cpp, linear; LinearAlgebra.cpp, should_fold",
)

register(
    "_trilinear",
    lacks=lacking("baddbmm_cuda", INTEGERS),
    source="Linear.cpp, _trilinear and sumproduct_pair",
)


def _trace(source: torch.Tensor) -> torch.Tensor:
    """``trace``: on a card the sum of a diagonal, of truth values, too."""
    if source.dtype is torch.bool and source.dim() == 2:  # noqa: PLR2004  # a matrix
        return source.diagonal().sum()
    return torch.trace(source)


register("trace", compute=only(_trace), source="cuda/TriangularOps.cu, trace_cuda")

# -- decompositions -------------------------------------------------------------------

register(
    """
    inverse linalg_cholesky linalg_det linalg_inv linalg_ldl_factor linalg_lu_factor
    linalg_slogdet
    """,
    composed=into_out,
    source=_COMPOSED,
)


def _needs_vectors(source: torch.Tensor) -> bool:
    """Tell whether a gradient may be asked for; C++ says so of any subclass."""
    is_dual = torch.autograd.forward_ad._current_level >= 0  # no public way to ask
    return is_dual or (source.requires_grad and torch.is_grad_enabled())


def _eigvalsh(source: torch.Tensor, UPLO: str = "L") -> torch.Tensor:  # noqa: N803  # the operator's signature
    values: torch.Tensor = _aten._linalg_eigh(source, UPLO, _needs_vectors(source))[0]
    return values


def _svdvals(source: torch.Tensor, *, driver: str | None = None) -> torch.Tensor:
    vectors = _needs_vectors(source)
    values: torch.Tensor = _aten._linalg_svd(source, False, vectors, driver=driver)[1]
    return values


for _name, _values in (("linalg_eigvalsh", _eigvalsh), ("linalg_svdvals", _svdvals)):
    register(
        _name,
        composed=lambda func, values=_values: into_out(func) or values,
        source="BatchLinearAlgebra.cpp, _may_require_fw_or_bw_grad",
    )
register(
    "linalg_matrix_rank",
    composed=lambda func: into_out(func, casts=True) or on_host(func),
    source=_COMPOSED,
)
register("linalg_cond linalg_matrix_norm", composed=landing, source=_COMPOSED)
# The tolerances that C++ makes for it are the host's.
register("linalg_pinv", takes_host=True, source=_COMPOSED)
register("vander", composed=on_host, source=_COMPOSED)

# The CPU's kernels write past the strides of ``out=``, and past its memory.
register(
    "linalg_lu lu_unpack tril triu", compute=packing, source="cuda/TriangularOps.cu"
)

# -- norms and distances --------------------------------------------------------------

register(
    "norm",
    requests=norming,
    source="cuda/ReduceNormKernel.cu, norm_kernel_cuda",
)
