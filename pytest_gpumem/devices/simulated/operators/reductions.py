"""Reductions, for example sums; running sums; and softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.accumulation import accumulating
from pytest_gpumem.devices.simulated.kernel_types import HALVES
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.operators.checks import are_formulas_active
from pytest_gpumem.devices.simulated.operators.composing import by_formula, only
from pytest_gpumem.devices.simulated.operators.out_checks import FOUND, names_of_outs
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Temporary,
    copy_of,
    packed,
)
from pytest_gpumem.kernels.reduction_memory import scratch_bytes
from pytest_gpumem.kernels.sort_memory import scan_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.operators.registry import Kernel
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep

_aten = torch.ops.aten

#: Half precision is accumulated in single precision. Source: ``at::opmath_type``.
_OPMATH_BYTES = {torch.float16: 4, torch.bfloat16: 4}


#: Bytes that a block passes on for a mean and a variance: two accumulators and two
#: counts. Source: ``WelfordData`` of ``SharedReduceOps.h``.
_WELFORD_BYTES = {torch.float64: 32}
#: Bytes of a number and its index. Source: ``ArgReduceOps`` of ``SharedReduceOps.h``.
_PAIR_BYTES = 16


def parts_of(
    call: Call, operand: torch.Tensor, dims: Any, element_bytes: int
) -> Iterator[Temporary]:
    """Request the buffers through which the blocks of a reduction exchange results.

    Args:
        call: The call, which gives the card.
        operand: The operand, or a tensor of the same shape and strides.
        dims: The dimensions that are reduced: one number, several, or None for all.
        element_bytes: Bytes of an accumulator.
    """
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    count = operand.dim()
    if not isinstance(dims, (list, tuple)) or not dims:
        reduced = list(range(count))
    else:
        reduced = [dim % count for dim in dims] if count else []
    shape, strides = operand.shape, operand.stride()
    for nbytes in scratch_bytes(
        shape, strides, reduced, element_bytes, call.processors
    ):
        yield Temporary(nbytes)


def opmath_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of the accumulator of a sum."""
    return _OPMATH_BYTES.get(dtype, dtype.itemsize)


def _reducing(call: Call) -> Iterator[RequestStep]:
    """Request the memory of a sum in the result's dtype.

    An operand of another dtype is converted first, unless it is of half precision.
    """
    yield Results()
    operand: torch.Tensor = call["self"]
    result: Any = call.results[0]
    dtype = operand.dtype
    widens = dtype in _OPMATH_BYTES and result.dtype is torch.float32
    if dtype is not result.dtype and not widens:
        yield copy_of(operand, result.dtype)
        dtype = result.dtype
    yield from parts_of(call, operand, call.get("dim"), opmath_bytes(dtype))


def _counting(call: Call) -> Iterator[RequestStep]:
    """Request the memory of ``(self != 0).sum(dim)``; booleans are not compared."""
    operand = call["self"]
    if operand.dtype is not torch.bool:
        yield copy_of(operand, torch.bool)
    yield Results()
    yield copy_of(operand, torch.int64)
    yield from parts_of(call, operand, call.get("dim"), 8)


def _selecting(call: Call) -> Iterator[RequestStep]:
    """Request the memory to find a largest or smallest number.

    The accumulator has the operand's dtype.
    """
    yield Results()
    operand = call["self"]
    if call.overload == "other":
        return
    pairs = call.overload in {"dim", "names_dim"}
    nbytes = _PAIR_BYTES if pairs else operand.itemsize
    yield from parts_of(call, operand, call.get("dim", ()), nbytes)


def _finding(call: Call) -> Iterator[RequestStep]:
    yield Results()
    yield from parts_of(call, call["self"], call["dim"], _PAIR_BYTES)


def _deciding(call: Call) -> Iterator[RequestStep]:
    """Request the memory of ``allany_impl``; a single number is only converted."""
    yield Results()
    operand = call["self"]
    if operand.numel() == 1:
        if operand.dtype is not torch.bool:
            yield Temporary(1)
    else:
        yield from parts_of(call, operand, call.get("dim"), 1)


def _varying(call: Call) -> Iterator[RequestStep]:
    """Request the memory of a variance.

    The variance of complex numbers is the sum of those of the real and imaginary parts.
    """
    operand = call["self"]
    if operand.is_complex():
        yield from _varying_twice(call)
        return
    yield Results()
    nbytes = _WELFORD_BYTES.get(operand.dtype, 16)
    yield from parts_of(call, operand, call.get("dim"), nbytes)


def _varying_twice(call: Call) -> Iterator[RequestStep]:
    """Request the memory of ``std_var_out`` and ``std_var_mean_out``, complex numbers."""
    variance: Any = call.results[0]
    parts = [copy_of(variance) for _each in call.results for _half in range(2)]
    if len(call.results) > 1:  # with means, which are converted to complex numbers
        yield from parts
        yield Results()
    else:
        yield Results()
        yield from parts


def norming(call: Call) -> Iterator[RequestStep]:
    """Request the memory of a norm, the sum of powers of absolute values, which are real.

    The norm over dimensions of length 1 is the absolute value.
    """
    yield Results()
    operand = call["self"]
    is_sized = call.name == "linalg_vector_norm"
    if operand.is_complex() and is_sized and _keeps_every(operand, call["dim"]):
        yield copy_of(operand)  # ``abs`` computes a complex result first
        return
    real = operand.dtype.to_real()
    yield from parts_of(call, operand, call.get("dim"), opmath_bytes(real))


def _keeps_every(operand: torch.Tensor, dims: Any) -> bool:
    """Return whether every reduced dimension has length 1.

    C++ reads the length of dimension 0 of a single number, if it is named, as 0.
    Source: ``SizesAndStrides::SizesAndStrides``.
    """
    if isinstance(dims, int):
        dims = [dims]
    if not operand.dim():
        return not dims
    return all(operand.shape[dim] == 1 for dim in dims or range(operand.dim()))


def _between(call: Call) -> Iterator[RequestStep]:
    """Request a difference, then the memory of its norm."""
    shape = torch.broadcast_shapes(call["self"].shape, call["other"].shape)
    result: Any = call.results[0]
    dtype = torch.result_type(call["self"], call["other"])
    difference = torch.empty(shape, dtype=dtype, device="meta")
    yield copy_of(difference)
    yield Results()
    yield from parts_of(call, difference, None, opmath_bytes(result.dtype))


register("dist", requests=_between, source="Distance.cpp, dist")


def _commonest(call: Call) -> Iterator[RequestStep]:
    """Request a copy with the dimension last, unless the dimension is already last."""
    source, dim = call["self"], call["dim"]
    yield Results()
    if source.dim():
        last = source.transpose(dim, -1)
        if not last.is_contiguous():
            yield copy_of(last)


register(
    "mode", requests=_commonest, source="cuda/TensorModeKernel.cpp, mode_kernel_impl"
)


_KERNEL = "Reduce.cuh, gpu_reduce_kernel"

register(
    "sum",
    requests=_reducing,
    around=accumulating,
    source=f"{_KERNEL}; FunctionsManual.cpp, renorm_backward",
)


class _Product(torch.autograd.Function):
    """The product, whose gradient divides by the operand if it has no zeros.

    For a subclass of Tensor, C++ uses the formula for operands with zeros, which has
    other rounding errors, and other results for infinite numbers.

    Source: ``prod_backward`` of ``torch/csrc/autograd/FunctionsManual.cpp``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operand: torch.Tensor,
        dim: int | None,
        keepdim: bool,  # noqa: FBT001  # autograd passes positional arguments
        dtype: Any,
    ) -> torch.Tensor:
        reduced = () if dim is None else (dim, keepdim)
        result: torch.Tensor = torch.prod(operand, *reduced, dtype=dtype)
        ctx.save_for_backward(operand, result)
        ctx.dim, ctx.keepdim = dim, keepdim
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        operand, result = ctx.saved_tensors
        operand, dim = operand.to(grad.dtype), ctx.dim
        if dim is not None and not ctx.keepdim:
            grad, result = grad.unsqueeze(dim), result.unsqueeze(dim)
        has_values = card_of(operand.device.index).value_device != "meta"
        zeros, count = operand == 0, 0  # without values no factor counts as 0
        if dim is not None:
            total = zeros.sum(dim, keepdim=True).sum()
            count = int(total) if has_values else 0
            del total
        elif has_values:
            count = len(zeros.nonzero())
        del zeros
        if not count:
            return grad * (result / operand).conj(), None, None, None
        if dim is None:
            if count > 1 and not torch.is_grad_enabled():
                return torch.zeros_like(operand), None, None, None
            flat = operand.contiguous().view(-1)
            found = _with_zeros(grad, flat, 0).view_as(operand)
        else:
            found = _with_zeros(grad, operand, dim)
        return found, None, None, None


def _with_zeros(grad: torch.Tensor, operand: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the gradient of a product of factors that may be 0.

    Source: ``prod_safe_zeros_backward``.
    """
    if not operand.numel():
        return torch.zeros_like(operand)
    if operand.shape[dim] == 1:
        return grad
    ones = torch.ones_like(operand.narrow(dim, 0, 1))
    last = operand.shape[dim] - 1
    before = torch.cat((ones, operand.narrow(dim, 0, last)), dim).cumprod(dim)
    after = torch.cat((ones, operand.narrow(dim, 1, last).flip(dim)), dim)
    after = after.cumprod(dim).flip(dim)
    return grad * (before * after).conj()


def _multiplied(func: Any) -> Callable[..., Any] | None:
    """Multiply with ``_Product``, unless a formula other than the gradient's is needed."""
    names = {"default": (), "dim_int": ("dim", "keepdim")}.get(func._overloadname)
    if names is None:
        return None
    formula = by_formula(func)

    def kernel(
        source: torch.Tensor,
        *args: Any,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Any:
        is_plain = (
            source.dim() > 0
            and not source.is_meta
            and not are_formulas_active()
            and torch._C._get_tracing_state()
            is None  # a trace would record the Function
        )
        if not is_plain or not source.requires_grad or not torch.is_grad_enabled():
            return formula(source, *args, dtype=dtype, **options)
        given = {"dim": None, "keepdim": False, **dict(zip(names, args, strict=False))}
        given |= options
        return _Product.apply(source, given["dim"], given["keepdim"], dtype)  # type: ignore[no-untyped-call]  # torch has no type hints here

    return kernel


register(
    "prod",
    requests=_reducing,
    formula=_multiplied,
    source=f"{_KERNEL}; FunctionsManual.cpp, prod_backward",
)
register("mean", requests=_reducing, source=_KERNEL)

# The tangent of ``prod`` needs products of the other factors, which begin with a 1.
register(
    "cat",
    helper=lambda _name, tensor: bool((tensor == 1).all()),
    source="FunctionsManual.cpp, prod_safe_zeros_backward",
)


def _nansum(source: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Run ``nansum``; a card also supports complex numbers."""
    if source.is_complex():
        return torch.sum(source.masked_fill(source.isnan(), 0), *args, **options)
    return torch.nansum(source, *args, **options)


register(
    "nansum",
    requests=_reducing,
    compute=only(_nansum),
    source=f"{_KERNEL}; cuda/ReduceSumProdKernel.cu, nansum_kernel_cuda",
)
register(
    "amax amin",
    requests=_selecting,
    source="cuda/ReduceMaxValuesKernel.cu, max_values_kernel_cuda",
)
register(
    "max min",
    requests=_selecting,
    source="cuda/ReduceMaxValuesKernel.cu, max_all_launch_kernel",
)
register(
    "argmax argmin",
    requests=_finding,
    source="cuda/ReduceArgMaxKernel.cu, argmax_kernel_cuda",
)
register(
    "all any",
    requests=_deciding,
    source="ReduceOps.cpp, allany_impl",
)
register(
    "std std_mean var var_mean",
    requests=_varying,
    source="cuda/ReduceMomentKernel.cu, std_var_kernel_cuda",
)
register(
    "linalg_vector_norm",
    requests=norming,
    around=accumulating,
    source="cuda/ReduceNormKernel.cu, norm_kernel_cuda; FunctionsManual.cpp, "
    "renorm_backward",
)
register(
    "count_nonzero",
    requests=_counting,
    source="TensorAdvancedIndexing.cpp, count_nonzero_cuda",
)


def _adding_exponentials(call: Call) -> Iterator[RequestStep]:
    """Request the maxima first; they are subtracted if they are finite."""
    operand: torch.Tensor = call["self"]
    result: Any = call.results[0]
    dims = call["dim"]
    if operand.dtype is not result.dtype:
        yield copy_of(operand, result.dtype)
        operand = torch.empty_like(operand, dtype=result.dtype, device="meta")
    largest = Temporary(result.numel() * operand.itemsize)
    yield largest
    parts = list(parts_of(call, operand, dims, operand.itemsize))
    yield from parts
    yield from (Free(each) for each in reversed(parts))
    sizes, are_infinite = copy_of(result), copy_of(result, torch.bool)
    yield from (sizes, are_infinite, Free(are_infinite), Free(sizes))
    yield copy_of(operand)
    yield Results()
    yield from parts_of(call, operand, dims, opmath_bytes(operand.dtype))


register(
    "logsumexp",
    requests=_adding_exponentials,
    source="ReduceOps.cpp, logsumexp_out_impl",
)


def _running(call: Call) -> Iterator[RequestStep]:
    """Request the memory of a running sum; integers are first converted to the result's."""
    yield Results()
    operand: torch.Tensor = call["self"]
    result: Any = call.results[0]
    if operand.dtype is not result.dtype or not operand.is_contiguous():
        yield copy_of(operand, result.dtype)
    yield from scan_of(operand, call["dim"], result.dtype)


def scan_of(operand: torch.Tensor, dim: int, dtype: torch.dtype) -> Iterator[Temporary]:
    """Request CUB's memory if one running sum spans the whole tensor: ``scan_dim``."""
    count = operand.numel()
    if operand.dim() and count == operand.shape[dim] and count:
        is_plain = dtype not in HALVES and not dtype.is_complex
        yield Temporary(scan_bytes(count, dtype.itemsize, is_plain=is_plain))


register(
    "cumsum",
    requests=_running,
    source="ScanKernels.cpp, cumsum_cuda_kernel",
)


def _undiffed(func: Any) -> Kernel | None:
    """Check ``out=`` of ``diff`` without differences, which are copied to any device."""
    if not names_of_outs(func):
        return None

    def kernel(source: torch.Tensor, n: int = 1, *args: Any, **options: Any) -> Any:
        out = options["out"].device
        if n == 0 and out != source.device:
            raise RuntimeError(FOUND.format(source=source.device, out=out))
        return func.decompose(source, n, *args, **options)

    return kernel


register("diff", composed=_undiffed, source="ReduceOps.cpp, diff_out_helper")
register(
    "cumprod logcumsumexp",
    requests=_running,
    source="cuda/ScanKernels.cpp; cuda/ScanUtils.cuh, scan_dim",
)

# -- softmax --------------------------------------------------------------------------


def _softmax(operator: Any) -> Callable[..., Any]:
    """Return ``softmax`` or ``log_softmax`` with ``dtype=``.

    On a card, the kernel itself converts half precision to single precision.
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
    """Return the CPU's softmax of half precision with a single-precision result."""

    def compute(source: torch.Tensor, dim: int, half_to_float: bool) -> Any:  # noqa: FBT001  # the operator's signature
        return operator(source.float() if half_to_float else source, dim, False)

    return compute


def _narrowing(operator: Any) -> Callable[..., Any]:
    """Return the CPU's gradient of a softmax from half to single precision."""

    def compute(grad: torch.Tensor, output: Any, dim: int, dtype: torch.dtype) -> Any:
        return operator(grad, output, dim, grad.dtype).to(dtype)

    return compute


def _of_rows(call: Call) -> Iterator[RequestStep]:
    """Request a contiguous operand."""
    yield Results()
    yield packed(call["self"])


def _multiplying(call: Call) -> Iterator[RequestStep]:
    """Request the gradient times the output, which is computed first, and is contiguous."""
    grad, output = call["grad_output"], call["output"]
    yield Results()
    yield copy_of(grad)
    if not grad.is_contiguous():
        first, second = (
            torch.empty_strided(each.shape, each.stride(), device="meta")
            for each in (grad, output)
        )
        if not (first * second).is_contiguous():
            yield copy_of(grad)


def _of_rows_backward(call: Call) -> Iterator[RequestStep]:
    """Request a contiguous gradient."""
    yield Results()
    yield packed(call["grad_output"])


def _safe(call: Call) -> Iterator[RequestStep]:
    """Request the memory of a softmax, then of a mask for rows of only minus infinity.

    The result is 0 in these rows.
    """
    source, dim = call["self"], call["dim"]
    length = source.shape[dim] if source.dim() else 1
    yield Results()
    yield copy_of(source, torch.bool)
    yield Temporary(source.numel() // max(length, 1))
    yield Temporary(source.itemsize)


register(
    "_safe_softmax", requests=_safe, source="transformers/attention.cpp, _safe_softmax"
)

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
        requests=_of_rows,
        source=f"cuda/SoftMax.cu, {_name}_cuda_out and host_softmax",
    )
    register(
        f"_{_name}_backward_data",
        compute=only(_narrowing(getattr(_aten, f"_{_name}_backward_data").default)),
        requests=_multiplying if _name == "softmax" else _of_rows_backward,
        source=f"cuda/SoftMax.cu, {_name}_backward_cuda_out and host_softmax_backward",
    )


def _renorming(call: Call) -> Iterator[RequestStep]:
    """Request the norm of each slice, then its factor.

    For half precision, the norms are of single precision and the factors of half.
    """
    yield Results()
    source: torch.Tensor = call["self"]
    slices = source.shape[call["dim"]]
    norm_bytes = opmath_bytes(source.dtype.to_real())
    yield Temporary(slices * norm_bytes)
    if norm_bytes != source.itemsize:
        yield Temporary(slices * source.itemsize)


register("renorm", requests=_renorming, source="Normalization.cpp, renorm_out")


def _by_segments(call: Call) -> Iterator[RequestStep]:
    """Request the memory to compute segment offsets from lengths, or the reverse."""
    yield Results()
    source: torch.Tensor = call["data"]
    lengths, offsets = call["lengths"], call["offsets"]
    if lengths is not None:
        rows = lengths.numel() // max(lengths.shape[-1], 1)
        zeros = Temporary(rows * lengths.itemsize)
        ends = Temporary((lengths.numel() + rows) * lengths.itemsize)
        yield from (zeros, ends, Free(zeros))
        if lengths.dim() == 1:
            count = lengths.numel() + 1
            scan = Temporary(scan_bytes(count, lengths.itemsize, is_plain=True))
            yield from (scan, Free(scan))
    elif offsets is not None:
        rows = offsets.numel() // max(offsets.shape[-1], 1)
        yield Temporary((offsets.numel() - rows) * offsets.itemsize)
    if source.dim() == 1 and call.name == "segment_reduce":
        yield Temporary(1)  # CUB's buffer if one block is enough


def _segments(_func: Any, operands: list[Operand]) -> None:
    for each in operands[1:]:
        if each.device != operands[0].device:
            raise RuntimeError(
                f"Expected data.get_device() == {each.name}_value.get_device() to be true, "
                "but got false.  (Could this error message be improved?  If so, please "
                "report an enhancement request to PyTorch.)"
            )


register(
    "segment_reduce",
    requests=_by_segments,
    check=_segments,
    source="SegmentReduce.cpp, segment_reduce_kernel; cuda/SegmentReduce.cu",
)
register(
    "_segment_reduce_backward",
    requests=_by_segments,
    source="SegmentReduce.cpp, segment_reduce_kernel; cuda/SegmentReduce.cu",
)
