"""Losses."""

from __future__ import annotations

from pytest_gpumem.devices.simulated.operators.composing import on_host
from pytest_gpumem.devices.simulated.operators.registry import Cast, register

_TO_FLOAT32 = "autocast_mode.h, AT_FORALL_FP32"

register(
    "binary_cross_entropy_with_logits mse_loss smooth_l1_loss",
    autocast=Cast("float32"),
    source=_TO_FLOAT32,
)
register(
    """
    cosine_embedding_loss cosine_similarity cross_entropy_loss hinge_embedding_loss
    kl_div l1_loss margin_ranking_loss multi_margin_loss multilabel_margin_loss nll_loss
    poisson_nll_loss soft_margin_loss triplet_margin_loss
    """,
    autocast=Cast("float32"),
    source=_TO_FLOAT32,
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
