"""Loss functions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.kernel_types import HALVES, type_name
from pytest_gpumem.devices.simulated.operators.checks import (
    first_operand_only,
    in_kernel,
    iterated_on_first,
    iterated_reversed,
    iterated_without_numbers,
    refuse_devices,
)
from pytest_gpumem.devices.simulated.operators.composing import only, widening
from pytest_gpumem.devices.simulated.operators.reductions import (
    opmath_bytes,
    parts_of,
)
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Sized,
    Temporary,
    copy_of,
)
from pytest_gpumem.kernels.sort_memory import INDEX_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.operators.registry import Kernel
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep


#: Losses that are not reduced: ``at::Reduction::None``.
_NONE = 0


def _total(call: Call, losses: torch.Tensor) -> Iterator[RequestStep]:
    """Request the mean or sum of losses, and the memory of the reduction."""
    yield Temporary(losses.itemsize)
    yield from parts_of(call, losses, None, opmath_bytes(losses.dtype))


def _shrinking(call: Call) -> Iterator[RequestStep]:
    """Request a result as large as the losses, even if it is resized to their mean."""
    losses = _broadcast(call)
    if call["reduction"] == _NONE:
        return
    yield Sized(0, losses.numel() * losses.itemsize)
    yield copy_of(losses)
    yield from parts_of(call, losses, None, opmath_bytes(losses.dtype))


def _reduced_in_place(call: Call) -> Iterator[RequestStep]:
    """Request the losses; they are reduced in place and keep their bytes."""
    losses = _broadcast(call)
    yield Sized(0, losses.numel() * losses.itemsize)
    if call["reduction"] != _NONE:
        yield from _total(call, losses)


def _with_losses(call: Call) -> Iterator[RequestStep]:
    losses = _broadcast(call)
    if call["reduction"] == _NONE:
        return
    yield copy_of(losses)
    yield Results()
    yield from parts_of(call, losses, None, opmath_bytes(losses.dtype))


def _with_logits(call: Call) -> Iterator[RequestStep]:
    losses = _broadcast(call)
    logarithms = copy_of(losses)
    yield logarithms
    weight = call["pos_weight"]
    if weight is not None:
        less, scaled = copy_of(weight), copy_of(losses)
        yield less
        if weight.shape != losses.shape:
            yield scaled
            yield Free(less)
            yield Free(scaled)
        else:
            yield Free(less)
    if call["reduction"] == _NONE:
        return
    yield copy_of(losses)
    yield Results()
    yield from parts_of(call, losses, None, opmath_bytes(losses.dtype))


def _broadcast(call: Call) -> torch.Tensor:
    """Return a tensor without values that has the shape of the unreduced losses."""
    source, target = call["self"], call["target"]
    shape = torch.broadcast_shapes(source.shape, target.shape)
    dtype = torch.promote_types(source.dtype, target.dtype)
    if shape == source.shape and dtype is source.dtype:
        return torch.empty_like(source, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta")


register(
    "binary_cross_entropy",
    requests=_reduced_in_place,
    check=iterated_without_numbers,
    source="cuda/Loss.cu, binary_cross_entropy_out_cuda",
)
register(
    "soft_margin_loss",
    requests=_reduced_in_place,
    check=iterated_on_first,
    source="Loss.cpp, soft_margin_loss_out",
)


def _three_steps(call: Call) -> Iterator[RequestStep]:
    """Request three buffers to compute the exponential of minus target times input."""
    losses = _broadcast(call)
    negative, product, exponential = (copy_of(losses) for _each in range(3))
    yield from (negative, product, exponential, Free(product), Free(negative))
    yield Results()


register(
    "soft_margin_loss_backward",
    requests=_three_steps,
    source="Loss.cpp, soft_margin_loss_backward_out",
)


def _of_one_device(func: Any, operands: list[Operand]) -> None:
    """Check as a ``TensorIterator`` that takes its device from a first host operand."""
    first = operands[0]
    if first.device.type == "cpu" and not first.tensor.dim():
        refuse_devices(first.device, operands[1].device)
    iterated_without_numbers(func, operands)


def _with_target(func: Any, operands: list[Operand]) -> None:
    """Check the target first, because C++ creates its first tensor from it."""
    first_operand_only(func, [operands[1], operands[0]])
    iterated_reversed(func, operands)


register("huber_loss", requests=_with_losses, source="Loss.cpp, huber_loss")
register(
    "mse_loss",
    requests=_shrinking,
    check=_of_one_device,
    source="Loss.cpp, TORCH_META_FUNC(mse_loss)",
)
register(
    "smooth_l1_loss",
    requests=_shrinking,
    check=in_kernel,
    source="Loss.cpp, TORCH_META_FUNC(smooth_l1_loss)",
)
register(
    "binary_cross_entropy_with_logits",
    requests=_with_logits,
    check=_with_target,
    source="Loss.cpp, binary_cross_entropy_with_logits",
)
register(
    "nll_loss2d_forward",
    alert="nll_loss2d_forward_out_cuda_template",
    alerts=lambda _func, args, _options: bool(args[3]),  # not by element
    source="cuda/NLLLoss2d.cu, nll_loss2d_forward_out_cuda_template",
)


def _ctc_loss(_func: Any) -> Kernel:
    """Compose ``ctc_loss``; C++ would create the lengths for the mean on the host."""

    def kernel(  # noqa: PLR0917  # the operator's signature
        source: torch.Tensor,
        targets: torch.Tensor,
        input_lengths: Any,
        target_lengths: Any,
        blank: int = 0,
        reduction: int = 1,
        zero_infinity: bool = False,  # noqa: FBT001, FBT002
    ) -> torch.Tensor:
        is_batch = source.dim() == 3  # noqa: PLR2004  # dimensions: steps, batch, classes
        if not is_batch:
            source, targets = source.unsqueeze(1), targets.unsqueeze(0)
        targets = targets.to(source.device, torch.int64)
        lengths = [
            each.reshape(-1).tolist() if isinstance(each, torch.Tensor) else list(each)
            for each in (input_lengths, target_lengths)
        ]
        made: torch.Tensor = torch.ops.aten._ctc_loss.default(
            source, targets, *lengths, blank, zero_infinity
        )[0]
        if zero_infinity:
            zero = made.new_zeros(())  # C++ evaluates the last operands first
            made = torch.where(made == math.inf, zero, made)
        if reduction == _MEAN:
            counts = made.new_tensor(lengths[1]).clamp_min(1)
            return (made / counts).mean()
        if reduction == _SUM:
            return made.sum()
        return made if is_batch else made.squeeze(0)

    return kernel


def _aligning(call: Call) -> Iterator[RequestStep]:
    """Request the positions and lengths of the targets on the card, and the table.

    The gradient has a second table before its result.
    """
    nbytes = call["log_probs"].shape[1] * INDEX_BYTES
    positions, targets, inputs = (Temporary(nbytes) for _each in range(3))
    yield from (positions, targets, inputs)
    if len(call.results) == 1:
        table = copy_of(call["log_alpha"])
        yield from (table, Results(), Free(table))
    else:
        yield from (Results(1), Results(0))
    yield from map(Free, (targets, positions, inputs))


#: The numbers of the reductions. Source: ``aten/src/ATen/core/Reduction.h``.
_MEAN: Final = 1
_SUM: Final = 2

register("ctc_loss", composed=_ctc_loss, source="LossCTC.cpp, ctc_loss_impl")
# The lengths may be on the host.
register(
    "_ctc_loss",
    takes_host=True,
    requests=_aligning,
    source="cuda/LossCTC.cu, ctc_loss_gpu_template",
)
register(
    "_ctc_loss_backward",
    requests=_aligning,
    alert="ctc_loss_backward_gpu",
    source="cuda/LossCTC.cu, ctc_loss_backward_gpu_template",
)


def _cosine_similarity(
    x1: torch.Tensor, x2: torch.Tensor, dim: int = 1, eps: float = 1e-8
) -> torch.Tensor:
    """Run ``cosine_similarity``; C++ would create a tensor for ``eps`` on the host."""
    common = torch.result_type(x1, x2)
    if not common.is_floating_point:
        raise RuntimeError(
            "expected common dtype to be floating point, yet common dtype is "
            + type_name(common)
        )
    shape = torch.broadcast_shapes(x1.shape, x2.shape)
    wholes = [each.to(common).expand(shape) for each in (x1, x2)]
    norms = [
        torch.linalg.vector_norm(whole, 2, dim, keepdim=True).clone()
        for whole in wholes
    ]
    with torch.no_grad():
        wide = torch.float32 if common in HALVES else common
        least = norms[0].new_full((), eps, dtype=wide)
        for norm in norms:
            norm.clamp_min_(least)
    # C++ frees all of these tensors together at the end.
    normal = [whole / norm for whole, norm in zip(wholes, norms, strict=True)]
    product = normal[0] * normal[1]
    cosine: torch.Tensor = product.sum(dim)
    del least
    return cosine


register(
    "cosine_similarity",
    composed=only(_cosine_similarity),
    source="Distance.cpp, cosine_similarity",
)

# -- in half precision ------------------------------------------------------------------

register(
    "multi_margin_loss_backward multilabel_margin_loss_backward",
    compute=widening,
    source="cuda/MultiMarginLoss.cu and cuda/MultiLabelMarginCriterion.cu",
)


def _for_each_row(call: Call) -> Iterator[RequestStep]:
    """Request a loss for each row; the result is computed from these losses."""
    source: torch.Tensor = call["self"]
    yield Results()
    if source.dim() > 1 and call["reduction"] != _NONE:
        yield Temporary(source.shape[0] * source.itemsize)


register(
    "multi_margin_loss",
    compute=widening,
    requests=_for_each_row,
    source="cuda/MultiMarginLoss.cu, multi_margin_loss_cuda_out",
)


def _targets_first(call: Call) -> Iterator[RequestStep]:
    """Request the mask of targets first, then a loss for each row."""
    source: torch.Tensor = call["self"]
    yield Results(1)
    if source.dim() > 1 and call["reduction"] != _NONE:
        yield Temporary(source.shape[0] * source.itemsize)
    yield Results(0)


register(
    "multilabel_margin_loss_forward",
    compute=widening,
    requests=_targets_first,
    source="cuda/MultiLabelMarginCriterion.cu, multilabel_margin_loss_forward_out",
)


def _by_product(call: Call) -> Iterator[RequestStep]:
    """Request the memory of ``_euclidean_dist``.

    It is one product of the rows, which are extended by their norms and by ones.
    """
    first, second = call["x1"], call["x2"]
    width = first.shape[-1]
    rows = [each.numel() // max(width, 1) * each.itemsize for each in (first, second)]
    pads, norms = [], []
    for each, nbytes in zip((first, second), rows, strict=True):
        squares, norm, pad = copy_of(each), Temporary(nbytes), Temporary(nbytes)
        yield from (squares, norm, Free(squares), pad)
        norms.append(norm)
        pads.append(pad)
    scaled, left = copy_of(first), Temporary(rows[0] * (width + 2))
    yield from (scaled, left, Free(pads[0]), Free(norms[0]), Free(scaled))
    yield Temporary(rows[1] * (width + 2))
    yield from (Free(norms[1]), Free(pads[1]))
    yield Results()


register(
    "_euclidean_dist", requests=_by_product, source="Distance.cpp, _euclidean_dist"
)


def _for_each_pair(call: Call) -> Iterator[RequestStep]:
    """Request the gradients of all pairs of rows, before they are summed."""
    yield Results()
    if call["p"] == 0:
        return
    if call.name == "_cdist_backward":
        pairs, width = call["cdist"].numel(), call["x1"].shape[-1]
        yield Temporary(pairs * width * call["x1"].itemsize)
    elif call["self"].numel():
        rows, width = call["self"].shape
        yield Temporary((rows - 1) * rows * width * call["self"].itemsize)


register(
    "_cdist_backward _pdist_backward",
    requests=_for_each_pair,
    source="cuda/DistanceKernel.cu, cdist_backward_kernel_impl",
)
