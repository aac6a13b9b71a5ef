"""Operators that take indices, gather and scatter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.operators.checks import iterated
from pytest_gpumem.devices.simulated.operators.composing import (
    on_cpu_alone,
    on_host,
    only,
)
from pytest_gpumem.devices.simulated.operators.registry import register

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.operators.checks import Place

_HOST: Final = torch.device("cpu")


def _indices(_func: Any, places: list[Place]) -> None:
    """Check that indices are the host's or the tensor's card's, values the card's."""
    target = places[0].device
    for each in places[1:]:
        if each.name == "indices" and each.device not in (target, _HOST):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed "
                f"tensor ({target})"
            )
        if each.name == "values" and each.device != target and each.tensor.dim() > 0:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two "
                f"devices, {target} and {each.device}!"
            )


_CHECK = "TensorIndexing.h and TensorAdvancedIndexing.cpp, make_info"

register(
    "_index_put_impl _unsafe_index _unsafe_index_put index",
    check=_indices,
    source=_CHECK,
)
register(
    "index_put",
    check=_indices,
    source=_CHECK,
)


def _mask(func: Any, places: list[Place]) -> None:
    """Check the mask first, a single one too."""
    target, mask = places[0].device, places[1].device
    if mask != target:
        raise RuntimeError(
            "expected self and mask to be on the same device, but got mask on "
            f"{mask} and self on {target}"
        )
    if target.type == "cpu" and places[-1].device != target:
        raise RuntimeError("masked_fill: Expected inputs to be on same device")
    iterated(func, places)


register("masked_fill", check=_mask, source="cuda/IndexKernel.cpp, masked_fill__cuda")
# How torch 2.15 assigns a number at indices of the host.
register(
    "index_fill_", takes_host=True, source="TensorAdvancedIndexing.cpp, index_fill_"
)
register(
    "combinations one_hot",
    composed=on_host,
    source="Itertools.cpp and Onehot.cpp: helpers by tensor.options()",
)


def _narrow_copy(
    source: torch.Tensor, dim: int, start: int, length: int
) -> torch.Tensor:
    """``narrow_copy``: a card copies a view; the CPU's own kernel errs otherwise."""
    part = source.narrow(dim, start, length)
    return part.clone(memory_format=torch.contiguous_format)


register(
    "narrow_copy",
    compute=only(_narrow_copy),
    composed=lambda func: on_cpu_alone(func) if func._overloadname == "out" else None,
    source="native_functions.yaml, dispatch: of narrow_copy.out the CPU alone",
)


def _reduces(args: tuple[Any, ...]) -> str:
    lacks = args[0].dtype is torch.bool and {"prod", "amin", "amax"} & set(args[4:5])
    return "cuda_scatter_gather_base_kernel_func" if lacks else ""


register(
    "scatter_reduce",
    lacks=_reduces,
    source="cuda/ScatterGatherKernel.cu, cuda_scatter_gather_base_kernel",
)
