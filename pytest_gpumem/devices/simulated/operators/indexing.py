"""Operators that take indices, gather and scatter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.accumulation import taking_over
from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.operators.checks import iterated
from pytest_gpumem.devices.simulated.operators.composing import (
    on_cpu_alone,
    on_host,
    only,
)
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Temporary,
    copy_of,
)
from pytest_gpumem.kernels.sorting import INDEX_BYTES, pairs_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.checks import Place
    from pytest_gpumem.devices.simulated.operators.requests import Call, Step

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


def _putting(call: Call) -> Iterator[Step]:
    """Sums at indices go over them in order: ``index_put_with_sort_kernel``."""
    yield Results()
    source, values = call["self"], call["values"]
    indices = [each for each in call["indices"] if each is not None]
    if not call["accumulate"] or any(each.dtype is torch.bool for each in indices):
        return
    if not indices or not source.is_contiguous():
        return
    shape = torch.broadcast_shapes(*(each.shape for each in indices))
    count = math.prod(shape)
    if not count or not source.numel():
        return
    if not call.get("unsafe", False) and not in_backward():
        # The least and the largest index are compared with the bounds.
        for each in indices:
            yield from _checking_bounds(each)
    linear = None
    for each in indices:
        wrapped = copy_of(each, torch.int64)
        scaled = copy_of(each, torch.int64)
        yield from (wrapped, scaled, Free(wrapped))
        if linear is None:
            linear = scaled
        else:
            yield Free(scaled)
    slices = source.numel() // math.prod(
        source.shape[place]
        for place, each in enumerate(call["indices"])
        if each is not None
    )
    if values.numel() < count * slices:
        yield Temporary(count * slices * source.itemsize)
    for _each in range(3):  # sorted, their order, the order before
        yield Temporary(count * INDEX_BYTES)
    bits = max(source.numel() // max(slices, 1), 1).bit_length()
    yield Temporary(pairs_bytes(count, INDEX_BYTES, bits))


def _checking_bounds(index: torch.Tensor) -> Iterator[Step]:
    least, largest = Temporary(index.itemsize), Temporary(index.itemsize)
    yield from (least, largest)
    for _each in range(2):
        is_within = Temporary(1)
        yield from (is_within, Free(is_within))
    yield from (Free(least), Free(largest))


_PUT = "cuda/Indexing.cu, index_put_with_sort_kernel"

register("_unsafe_index index", check=_indices, source=_CHECK)
register(
    "_index_put_impl _unsafe_index_put",
    check=_indices,
    requests=_putting,
    around=taking_over,
    source=f"{_CHECK}; {_PUT}",
)
register(
    "index_put",
    check=_indices,
    requests=_putting,
    around=taking_over,
    source=f"{_CHECK}; {_PUT}",
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
    "scatter_add",
    around=taking_over,
    source="TensorAdvancedIndexing.cpp, gather_backward",
)
register(
    "index_add put scatter",
    around=taking_over,
    source="FunctionsManual.cpp, value_selecting_reduction_backward and its like",
)


def _in_a_row(call: Call) -> Iterator[Step]:
    """Indices that do not lie in a row are copied first."""
    indices = call["indices"]
    copy = None if indices.is_contiguous() else copy_of(indices)
    if copy is not None:
        yield copy
    yield Results()


register("embedding", requests=_in_a_row, source="Embedding.cpp, embedding_symint")
register(
    "embedding_dense_backward",
    requests=_in_a_row,
    source="cuda/Embedding.cu, embedding_dense_backward_cuda",
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
