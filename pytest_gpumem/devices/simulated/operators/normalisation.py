"""Layers that normalise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import register

if TYPE_CHECKING:
    import torch

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
    """``_fused_rms_norm_backward``: a card's alone; sums are of single precision.

    The CPU composes ``rms_norm``; each step here is one of its gradients, in its order,
    so that values are the CPU's to the last bit.
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
    source="layer_norm.cpp, rms_norm_composite",
)
