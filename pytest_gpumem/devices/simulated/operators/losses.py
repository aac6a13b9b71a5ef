"""Losses."""

from __future__ import annotations

import torch

from pytest_gpumem.devices.simulated.operators.composing import on_host, only
from pytest_gpumem.devices.simulated.operators.registry import register

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
