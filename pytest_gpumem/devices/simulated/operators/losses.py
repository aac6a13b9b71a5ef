"""Losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_gpumem.devices.simulated.operators.composing import on_host, only, widening
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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, Step


#: Losses as they are: ``at::Reduction::None``.
_NONE = 0


def _total(call: Call, losses: torch.Tensor) -> Iterator[Step]:
    """Ask for the mean or the sum of losses, and for what makes it."""
    yield Temporary(losses.itemsize)
    yield from parts_of(call, losses, None, opmath_bytes(losses.dtype))


def _shrinking(call: Call) -> Iterator[Step]:
    """The result is as large as the losses, even where it becomes their mean."""
    losses = _broadcast(call)
    if call["reduction"] == _NONE:
        return
    yield Sized(0, losses.numel() * losses.itemsize)
    yield copy_of(losses)
    yield from parts_of(call, losses, None, opmath_bytes(losses.dtype))


def _reduced_in_place(call: Call) -> Iterator[Step]:
    """The losses become their own mean, and keep their bytes."""
    losses = _broadcast(call)
    yield Sized(0, losses.numel() * losses.itemsize)
    if call["reduction"] != _NONE:
        yield from _total(call, losses)


def _with_losses(call: Call) -> Iterator[Step]:
    losses = _broadcast(call)
    if call["reduction"] == _NONE:
        return
    yield copy_of(losses)
    yield Results()
    yield from parts_of(call, losses, None, opmath_bytes(losses.dtype))


def _with_logits(call: Call) -> Iterator[Step]:
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
    """Return a tensor of no values like the losses of the elements."""
    source, target = call["self"], call["target"]
    shape = torch.broadcast_shapes(source.shape, target.shape)
    dtype = torch.promote_types(source.dtype, target.dtype)
    if shape == source.shape and dtype is source.dtype:
        return torch.empty_like(source, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta")


register(
    "binary_cross_entropy",
    requests=_reduced_in_place,
    source="cuda/Loss.cu, binary_cross_entropy_out_cuda",
)
register(
    "soft_margin_loss",
    requests=_reduced_in_place,
    source="Loss.cpp, soft_margin_loss_out",
)


def _three_steps(call: Call) -> Iterator[Step]:
    """The exponential of minus target times input, in three buffers."""
    losses = _broadcast(call)
    negative, product, exponential = (copy_of(losses) for _each in range(3))
    yield from (negative, product, exponential, Free(product), Free(negative))
    yield Results()


register(
    "soft_margin_loss_backward",
    requests=_three_steps,
    source="Loss.cpp, soft_margin_loss_backward_out",
)
register("huber_loss", requests=_with_losses, source="Loss.cpp, huber_loss")
register(
    "mse_loss smooth_l1_loss",
    requests=_shrinking,
    source="Loss.cpp, TORCH_META_FUNC of both",
)
register(
    "binary_cross_entropy_with_logits",
    requests=_with_logits,
    source="Loss.cpp, binary_cross_entropy_with_logits",
)
register(
    "nll_loss2d_forward",
    alert="nll_loss2d_forward_out_cuda_template",
    source="cuda/NLLLoss2d.cu, nll_loss2d_forward_out_cuda_template",
)
register(
    "nll_loss2d_backward",
    alert="nll_loss2d_backward_out_cuda_template",
    source="cuda/NLLLoss2d.cu, nll_loss2d_backward_out_cuda_template",
)
register("ctc_loss", composed=on_host, source="LossCTC.cpp, ctc_loss")
# Its lengths may be the host's.
register("_ctc_loss", takes_host=True, source="cuda/LossCTC.cu, ctc_loss_gpu")
register(
    "_ctc_loss_backward",
    alert="ctc_loss_backward_gpu",
    source="cuda/LossCTC.cu, ctc_loss_backward_gpu",
)


def _cosine_similarity(
    x1: torch.Tensor, x2: torch.Tensor, dim: int = 1, eps: float = 1e-8
) -> torch.Tensor:
    """``cosine_similarity``: C++ makes the least norm, a tensor, on the host."""
    common = torch.result_type(x1, x2)
    if not common.is_floating_point:
        name = torch.empty(0, dtype=common, device="cpu").type()[6:-6]
        raise RuntimeError(
            "expected common dtype to be floating point, yet common dtype is " + name
        )
    shape = torch.broadcast_shapes(x1.shape, x2.shape)
    normal = []
    for each in (x1, x2):
        whole = each.to(common).expand(shape)
        norm = torch.linalg.vector_norm(whole, 2, dim, keepdim=True).clone()
        with torch.no_grad():
            norm.clamp_min_(eps)
        normal.append(whole / norm)
    cosine: torch.Tensor = (normal[0] * normal[1]).sum(dim)
    return cosine


register(
    "cosine_similarity",
    composed=only(_cosine_similarity),
    source="Distance.cpp, cosine_similarity",
)

# -- in half precision ------------------------------------------------------------------

register(
    """
    multi_margin_loss multi_margin_loss_backward multilabel_margin_loss_backward
    multilabel_margin_loss_forward
    """,
    compute=widening,
    source="cuda/MultiMarginLoss.cu and cuda/MultiLabelMarginCriterion.cu",
)
