"""Operators that sort, select by rank, and count."""

from __future__ import annotations

from typing import Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import HALVES, lacking
from pytest_gpumem.devices.simulated.operators.composing import (
    into_out,
    on_cpu_alone,
    on_host,
    only,
)
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
    compute=only(_histc),
    lacks=lacking("histc", HALVES | {torch.bool}),
    source="cuda/SummaryOps.cu, _histc_cuda",
)
register(
    """
    _histogramdd_bin_edges _histogramdd_from_bin_cts _histogramdd_from_bin_tensors
    histogram
    """,
    composed=on_cpu_alone,
    source="native_functions.yaml, dispatch: CPU",
)
