"""Sums and their like, running ones, and what a softmax makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import Results, Temporary
from pytest_gpumem.model.reductions import scratch_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, Step

_aten = torch.ops.aten

#: Accumulators of half precision are of single precision. Source: ``at::opmath_type``.
_OPMATH_BYTES = {torch.float16: 4, torch.bfloat16: 4}


def _reducing(call: Call) -> Iterator[Step]:
    """``gpu_reduce_kernel``: see ``model.reductions``."""
    yield Results()
    operand, dims = call["self"], call.get("dim")
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    count = operand.dim()
    if not isinstance(dims, (list, tuple)) or not dims:
        reduced = list(range(count))
    else:
        reduced = [dim % count for dim in dims] if count else []
    dtype = operand.dtype
    is_whole = not dtype.is_floating_point and not dtype.is_complex
    # Whole numbers are added up as int64.
    element_bytes = 8 if is_whole else _OPMATH_BYTES.get(dtype, dtype.itemsize)
    shape, strides = operand.shape, operand.stride()
    for nbytes in scratch_bytes(
        shape, strides, reduced, element_bytes, call.processors
    ):
        yield Temporary(nbytes)


_KERNEL = "Reduce.cuh, gpu_reduce_kernel"

register(
    "sum",
    requests=_reducing,
    source=_KERNEL,
)
register(
    "prod",
    requests=_reducing,
    source=_KERNEL,
)
register("mean", requests=_reducing, source=_KERNEL)


def _nansum(source: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """``nansum``: a card has it of complex numbers, too."""
    if source.is_complex():
        return torch.sum(source.masked_fill(source.isnan(), 0), *args, **options)
    return torch.nansum(source, *args, **options)


register(
    "nansum",
    requests=_reducing,
    compute=only(_nansum),
    source=f"{_KERNEL}; cuda/ReduceSumProdKernel.cu, nansum_kernel_cuda",
)


def _is_inexact(_func: Any, args: tuple[Any, ...]) -> bool:
    return bool(args[0].is_floating_point() or args[0].is_complex())


register(
    "cumsum",
    alert="cumsum_cuda_kernel",
    alerts=_is_inexact,
    source="ScanKernels.cpp, cumsum_cuda_kernel",
)

# -- softmax --------------------------------------------------------------------------


def _softmax(operator: Any) -> Callable[..., Any]:
    """Return ``softmax`` or ``log_softmax`` with ``dtype=``.

    On a card half precision becomes single precision inside the kernel.
    """

    def kernel(
        source: torch.Tensor, dim: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if source.dtype is torch.float16 and dtype is torch.float32:
            widened: torch.Tensor = operator(source, dim, True)
            return widened
        converted = source if dtype is None else source.to(dtype)
        result: torch.Tensor = operator(converted, dim, False)
        return result

    return kernel


def _widening(operator: Any) -> Callable[..., Any]:
    """Return how the CPU computes a softmax that makes single precision of half."""

    def compute(source: torch.Tensor, dim: int, half_to_float: bool) -> Any:  # noqa: FBT001  # the operator's signature
        return operator(source.float() if half_to_float else source, dim, False)

    return compute


def _narrowing(operator: Any) -> Callable[..., Any]:
    """Return how the CPU computes the gradient of such a softmax."""

    def compute(grad: torch.Tensor, output: Any, dim: int, dtype: torch.dtype) -> Any:
        return operator(grad, output, dim, grad.dtype).to(dtype)

    return compute


for _name in ("softmax", "log_softmax"):
    _inner = getattr(_aten, f"_{_name}")
    register(
        _name,
        composed=only(_softmax(_inner.default), "int"),
        source=f"SoftMax.cpp, {_name}",
    )
    register(
        f"_{_name}",
        compute=only(_widening(_inner.default)),
        source=f"cuda/SoftMax.cu, {_name}_cuda_out",
    )
    register(
        f"_{_name}_backward_data",
        compute=only(_narrowing(getattr(_aten, f"_{_name}_backward_data").default)),
        source=f"cuda/SoftMax.cu, {_name}_backward_cuda_out",
    )
