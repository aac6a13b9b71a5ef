"""Layers that normalise."""

from __future__ import annotations

from typing import Any

import torch

from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import Cast, register

register(
    "group_norm layer_norm",
    autocast=Cast("float32"),
    source="autocast_mode.h, AT_FORALL_FP32",
)
# They change running statistics, of which their schemas say nothing.
register(
    "batch_norm cudnn_batch_norm native_batch_norm",
    has_effects=True,
    source="native_functions.yaml",
)


def _rms_norm_backward(  # noqa: PLR0917  # the operator's signature
    grad: torch.Tensor,
    source: torch.Tensor,
    shape: list[int],
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    wanted: list[bool],
) -> Any:
    """``_fused_rms_norm_backward``: a card's alone; sums are of single precision."""
    dims = list(range(-len(shape), 0))
    outer = list(range(source.dim() - len(shape)))
    wide = torch.float64 if source.dtype is torch.float64 else torch.float32
    normal = source.to(wide) * scale
    scaled = grad.to(wide) if weight is None else grad.to(wide) * weight
    by_source = scale * (scaled - normal * (scaled * normal).mean(dims, keepdim=True))
    by_weight = grad.to(wide) * normal
    by_weight = by_weight.sum(outer) if outer else by_weight
    return (
        by_source.to(source.dtype) if wanted[0] else None,
        by_weight.to(weight.dtype) if wanted[1] and weight is not None else None,
    )


register(
    "_fused_rms_norm",
    has_cuda_kernel=True,
    source="native_functions.yaml, CUDA beside CompositeImplicitAutograd",
)
register(
    "_fused_rms_norm_backward",
    compute=only(_rms_norm_backward),
    source="FunctionsManual.cpp, infinitely_differentiable_native_rms_norm_backward",
)
