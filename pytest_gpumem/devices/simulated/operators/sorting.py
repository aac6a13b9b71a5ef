"""Operators that sort, select by rank, and count."""

from __future__ import annotations

from typing import Any

import torch

from pytest_gpumem.devices.simulated.operators.composing import into_out, on_host
from pytest_gpumem.devices.simulated.operators.registry import register


def _quantile(func: Any) -> Any:
    """Compute on the host; refuse shares on another device, as C++ does."""
    inner = on_host(func)

    def kernel(source: torch.Tensor, share: Any, *args: Any, **options: Any) -> Any:
        if isinstance(share, torch.Tensor) and share.device != source.device:
            raise RuntimeError(
                "quantile() q tensor must be on the same device as the input tensor"
            )
        return inner(source, share, *args, **options)

    return kernel


register(
    "nanquantile quantile",
    composed=_quantile,
    source="Sorting.cpp, quantile_checks: helpers by tensor.options()",
)
register("msort", composed=into_out, source="Sorting.cpp, msort_out")


def _returns_indices(func: Any, _args: tuple[Any, ...]) -> bool:
    return len(func._schema.returns) > 1


register(
    "median nanmedian",
    alert="median CUDA with indices output",
    alerts=_returns_indices,
    source="cuda/Sorting.cpp, median_with_indices_impl",
)
register(
    "kthvalue", alert="kthvalue CUDA", source="cuda/Sorting.cpp, kthvalue_out_cuda"
)


def _histc(source: torch.Tensor, *args: Any, **options: Any) -> Any:
    """``histc``: whole numbers are a card's alone."""
    if source.dtype.is_floating_point:
        return torch.histc(source, *args, **options)
    return torch.histc(source.double(), *args, **options).to(source.dtype)


register(
    "histc",
    alert="_histc_cuda",
    compute=_histc,
    source="cuda/SummaryOps.cu, _histc_cuda",
)
