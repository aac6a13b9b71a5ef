"""Losses."""

from __future__ import annotations

from pytest_gpumem.devices.simulated.operators.composing import on_host
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
