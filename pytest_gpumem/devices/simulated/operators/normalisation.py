"""Layers that normalise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import require_type
from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.reductions import opmath_bytes
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Sized,
    Temporary,
    packed,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.devices.simulated.operators.registry import Kernel
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep


def _is_unit(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a weight is all 1 or a bias all 0, as made by the rule of ``vmap``.

    The rule normalises with them, and applies the user's own weight and bias afterwards.
    """
    if name not in {"weight", "bias"}:
        return False
    return bool((tensor == (name == "weight")).all())


# These operators change running statistics; their schemas do not declare that.
register(
    "batch_norm cudnn_batch_norm native_batch_norm",
    has_effects=True,
    helper=_is_unit,
    source="native_functions.yaml; functorch/BatchRulesNorm.cpp, batch_norm_batch_rule",
)


def _of_empty_batch(func: Any) -> Kernel:
    """Normalise a batch without elements; C++ would create its moments on the host."""

    def kernel(
        source: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        *others: Any,
    ) -> Any:
        if source.numel():
            return func.decompose(source, weight, bias, *others)
        dtype = torch.float32 if source.dtype.itemsize == 2 else source.dtype  # noqa: PLR2004  # bytes of half precision
        channels = source.shape[1] if source.dim() > 1 else 0
        mean, inverse = (source.new_empty(channels, dtype=dtype) for _each in range(2))
        made = source.clone()
        if weight is not None:
            made = made * weight[0]
        if bias is not None:
            made = made + bias[0]
        return made, mean, inverse, source.new_empty(0, dtype=torch.uint8), 0

    return kernel


register(
    "_batch_norm_impl_index",
    composed=_of_empty_batch,
    source="Normalization.cpp, _batch_norm_impl_index",
)


def _by_rows(call: Call) -> Iterator[RequestStep]:
    """Request contiguous operands first."""
    for name in ("input", "weight", "bias"):
        yield packed(call.get(name))
    yield Results()


def _layer_norm_requests(call: Call) -> Iterable[RequestStep]:
    """Request contiguous operands first; moments are of single precision for half."""
    operands = call.tensors
    source = operands[0]
    itemsize = opmath_bytes(source.dtype)
    if itemsize == source.itemsize and all(each.is_contiguous() for each in operands):
        return ()  # the results alone, in their order
    copies = map(packed, operands)
    moments: list[Any] = [call.results[index] for index in (1, 2)]
    sized = (Sized(at, each.numel() * itemsize) for at, each in enumerate(moments, 1))
    return (*copies, Results(0), *sized)


def _by_rows_backward(call: Call) -> Iterator[RequestStep]:
    """Request contiguous operands first, and a contiguous gradient last."""
    for name in ("input", "weight", "bias"):
        yield packed(call.get(name))
    yield Results()
    yield packed(call["grad_out"])


def _layer_norm(
    source: torch.Tensor,
    shape: Any,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Any:
    """Run ``native_layer_norm``: a card's kernel has one dtype for all operands."""
    require_type(source.dtype, weight, bias)
    return torch.ops.aten.native_layer_norm.default(source, shape, weight, bias, eps)


register(
    "native_layer_norm",
    requests=_layer_norm_requests,
    compute=only(_layer_norm),
    source="cuda/layer_norm_kernel.cu, layer_norm_cuda and LayerNormKernelImpl",
)
register(
    "native_layer_norm_backward",
    requests=_by_rows_backward,
    source="cuda/layer_norm_kernel.cu, layer_norm_backward_cuda",
)


def _rms_norm_backward(  # noqa: PLR0917  # the operator's signature
    grad: torch.Tensor,
    source: torch.Tensor,
    shape: list[int],
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    wanted: list[bool],
) -> Any:
    """Run ``_fused_rms_norm_backward``, which only a card has.

    Sums are of single precision. The CPU composes ``rms_norm`` of other operators; the
    steps here are the gradients of these operators, in the same order, so that the values
    equal the CPU's to the last bit.
    """
    dims = list(range(-len(shape), 0))
    outer = list(range(source.dim() - len(shape)))
    wide, upcast = source.to(scale.dtype), grad.to(scale.dtype)
    scaled = upcast if weight is None else upcast * weight
    by_scale = (scaled * wide).sum(dims, keepdim=True)
    by_mean = -0.5 * by_scale * scale.pow(3) / math.prod(shape)
    by_source = scaled * scale + by_mean * (2 * wide)
    by_weight = upcast * (wide * scale)
    by_weight = by_weight.sum(outer) if outer else by_weight
    return (
        by_source.to(source.dtype).contiguous() if wanted[0] else None,
        by_weight.to(weight.dtype) if wanted[1] and weight is not None else None,
    )


register(
    "_fused_rms_norm",
    has_cuda_kernel=True,
    requests=_by_rows,
    source="native_functions.yaml, CUDA beside CompositeImplicitAutograd; "
    "cuda/layer_norm_kernel.cu, _fused_rms_norm_cuda",
)
register(
    "_fused_rms_norm_backward",
    compute=only(_rms_norm_backward),
    requests=_by_rows_backward,
    source="layer_norm.cpp, rms_norm_composite; cuda/layer_norm_kernel.cu, "
    "_fused_rms_norm_backward_cuda",
)


# -- torch.nn.SyncBatchNorm: kernels that only a card has -------------------------------


def _wide(source: torch.Tensor) -> torch.Tensor:
    """Return the tensor that a kernel computes with: half becomes single precision."""
    return source if source.dtype.itemsize > 2 else source.float()  # noqa: PLR2004  # bytes of half precision


def _by_channel(figures: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape one number per channel so that it broadcasts over a batch."""
    return figures.view(1, -1, *(1 for _dim in range(like.dim() - 2)))


def _batch_dims(source: torch.Tensor) -> list[int]:
    return [dim for dim in range(source.dim()) if dim != 1]


def _batch_norm_stats(source: torch.Tensor, eps: float) -> Any:
    """Return the mean and the inverse standard deviation of each channel."""
    wide, dims = _wide(source), _batch_dims(source)
    mean = wide.mean(dims)
    variance = (wide - _by_channel(mean, wide)).square().mean(dims)
    return mean, (variance + eps).rsqrt()


def _batch_norm_gather_stats_with_counts(  # noqa: PLR0917  # the operator's signature
    _source: torch.Tensor,
    means: torch.Tensor,
    inverses: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_variance: torch.Tensor | None,
    momentum: float,
    eps: float,
    counts: torch.Tensor,
) -> Any:
    """Return the mean and the inverse standard deviation of each channel over all ranks.

    The ranks are added one after the other, as in the kernel.
    """
    mean, squares = means[0] * 0, means[0] * 0
    total = counts[0] * 0
    for count, each, inverse in zip(counts, means, inverses, strict=True):
        variance = (1 / inverse).square() - eps
        both = total + count
        squares = squares + variance * count
        squares = squares + (mean - each).square() * total * count / both
        mean = (total * mean + count * each) / both
        total = both
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(momentum * mean)
    if running_variance is not None:
        running_variance.mul_(1 - momentum).add_(momentum * squares / (total - 1))
    return mean, (squares / total + eps).rsqrt()


def _batch_norm_gather_stats(*args: Any) -> Any:
    """Do the same for ranks with the same number of values, the last argument."""
    means, count = args[1], args[-1]
    counts = means.new_full((means.shape[0],), count)
    return _batch_norm_gather_stats_with_counts(*(*args[:-1], counts))


def _batch_norm_elemt(  # the operator's signature
    source: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    _eps: float,
) -> torch.Tensor:
    """Normalise each element by the mean and deviation of its channel."""
    wide = _wide(source)
    found = (wide - _by_channel(mean, wide)) * _by_channel(inverse, wide)
    if weight is not None:
        found = found * _by_channel(_wide(weight), wide)
    if bias is not None:
        found = found + _by_channel(_wide(bias), wide)
    return found.to(source.dtype)


def _batch_norm_backward_reduce(  # noqa: PLR0917  # the operator's signature
    grad: torch.Tensor,
    source: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor | None,
    input_g: bool,  # noqa: FBT001
    weight_g: bool,  # noqa: FBT001
    bias_g: bool,  # noqa: FBT001
) -> Any:
    """Return the sums over the batch, and the gradients of weight and bias."""
    wide, upcast, dims = _wide(source), _wide(grad), _batch_dims(source)
    total = upcast.sum(dims)
    centred = (upcast * (wide - _by_channel(mean, wide))).sum(dims)
    kind = total.dtype if weight is None else weight.dtype
    return (
        total if input_g else None,
        centred if input_g else None,
        (centred * inverse).to(kind) if weight_g else None,
        total.to(kind, copy=True) if bias_g else None,
    )


def _batch_norm_backward_elemt(  # noqa: PLR0917  # the operator's signature
    grad: torch.Tensor,
    source: torch.Tensor,
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor | None,
    sum_dy: torch.Tensor,
    sum_dy_xmu: torch.Tensor,
    count: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of each element, from the sums of all ranks."""
    wide, number = _wide(source), count.sum()
    centred = wide - _by_channel(mean, wide)
    slope = _by_channel(sum_dy_xmu / number * inverse.square(), wide)
    found = _wide(grad) - _by_channel(sum_dy / number, wide) - centred * slope
    scale = inverse if weight is None else inverse * _wide(weight)
    return (found * _by_channel(scale, wide)).to(source.dtype)


for _name, _kernel in (
    ("batch_norm_stats", _batch_norm_stats),
    ("batch_norm_elemt", _batch_norm_elemt),
    ("batch_norm_backward_reduce", _batch_norm_backward_reduce),
    ("batch_norm_backward_elemt", _batch_norm_backward_elemt),
):
    register(_name, compute=only(_kernel), source="cuda/Normalization.cuh")
for _name, _gather in (
    ("batch_norm_gather_stats", _batch_norm_gather_stats),
    ("batch_norm_gather_stats_with_counts", _batch_norm_gather_stats_with_counts),
):
    register(
        _name,
        compute=only(_gather),
        has_effects=True,
        source="cuda/Normalization.cuh, batch_norm_reduce_statistics_kernel",
    )


def _lies_channels_last(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is channels last in memory: ``batch_norm_choose_impl``."""
    if tensor.is_contiguous():
        return tensor.stride(1) == 1
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    found = formats.get(tensor.dim())
    return found is not None and tensor.is_contiguous(memory_format=found)


def _batch_norm_backward(call: Call) -> Iterator[RequestStep]:
    """Request the sums over channels first if memory is channels last."""
    source: torch.Tensor = call["input"]
    if not _lies_channels_last(source):
        return
    wanted = call["output_mask"]
    is_training = call.get("train", call.get("update"))
    if not (is_training or wanted[1] or wanted[2]):
        return
    nbytes = source.shape[1] * opmath_bytes(source.dtype)
    sums, products = Temporary(nbytes), Temporary(nbytes)
    yield from (sums, products)
    yield Results(1)
    if wanted[1] and not wanted[2]:
        # Used even without a bias.
        yield Temporary(source.shape[1] * call["weight"].itemsize)
    yield Results(2)
    yield Results(0)


register(
    "native_batch_norm_backward batch_norm_backward",
    requests=_batch_norm_backward,
    helper=_is_unit,
    source="cuda/Normalization.cu, batch_norm_backward_reduce_cuda; "
    "functorch/BatchRulesNorm.cpp, batch_norm_backward_no_weight_bias_batch_rule",
)


def _group_norm_of_rows(source: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Run ``group_norm`` of a contiguous tensor; the CPU keeps channels last."""
    inner = torch.ops.aten.group_norm.default.decompose
    return inner(source.contiguous(), *args, **options)


register(
    "group_norm",
    composed=only(_group_norm_of_rows),
    source="group_norm.cpp, group_norm",
)


def _group_norm(call: Call) -> Iterator[RequestStep]:
    """Request moments and the scale of each channel, in single precision for half."""
    yield Results()
    source: torch.Tensor = call["input"]
    rows, channels, positions = call["N"], call["C"], call["HxW"]
    if not source.numel():
        return
    nbytes = opmath_bytes(source.dtype)
    if nbytes != source.itemsize:
        for _each in range(2):
            yield Temporary(rows * call["group"] * nbytes)
    has_scale = call["weight"] is not None or call["bias"] is not None
    if positions != 1 and has_scale:
        for _each in range(2):
            yield Temporary(rows * channels * nbytes)


register(
    "native_group_norm",
    requests=_group_norm,
    source="cuda/group_norm_kernel.cu, GroupNormKernelImplInternal",
)


def _group_norm_backward(call: Call) -> Iterator[RequestStep]:
    yield Results()
    source: torch.Tensor = call["input"]
    if not source.numel():
        return
    rows, channels, groups = call["N"], call["C"], call["group"]
    nbytes = opmath_bytes(source.dtype)
    for _each in range(2):
        yield Temporary(rows * channels * nbytes)
    if call["output_mask"][0]:
        parts = [Temporary(rows * groups * nbytes) for _each in range(2)]
        if call["HxW"] != 1 and call["weight"] is not None:
            parts.append(Temporary(rows * channels * nbytes))
        yield from parts
        yield from map(Free, parts)


register(
    "native_group_norm_backward",
    requests=_group_norm_backward,
    source="cuda/group_norm_kernel.cu, GroupNormBackwardKernelImplInternal",
)
