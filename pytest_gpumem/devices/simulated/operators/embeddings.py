"""Embeddings and embedding bags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.kernel_types import HALVES, require_type
from pytest_gpumem.devices.simulated.operators.checks import check_of
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Temporary,
    copy_of,
)
from pytest_gpumem.kernels.embedding_memory import UNSORTED, add_to_rows, parts
from pytest_gpumem.kernels.sort_memory import (
    INDEX_BYTES,
    pairs_bytes,
    scan_by_key_bytes,
    scan_bytes,
    unique_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep


def _in_a_row(call: Call) -> Iterator[RequestStep]:
    """Request a copy of indices that are not contiguous first."""
    if not call["indices"].is_contiguous():
        yield copy_of(call["indices"])
    yield Results()


register(
    "embedding",
    requests=_in_a_row,
    check=check_of("_index_select", ("self", "index")),
    source="Embedding.cpp, embedding_symint",
)


def _gradient(call: Call) -> Iterator[RequestStep]:
    indices, grad = call["indices"], call["grad_output"]
    for each in (indices, grad):
        if not each.is_contiguous():
            yield copy_of(each)
    if indices.numel() > UNSORTED or call["scale_grad_by_freq"]:
        yield from _sorted(call, indices, call["num_weights"].bit_length())
    yield Results()


def _sorted(call: Call, indices: torch.Tensor, bits: int) -> Iterator[RequestStep]:
    """Request the memory to sort indices and to sum the gradients of equal indices.

    Args:
        call: The call; its result is the gradient of the weight.
        indices: Indices of the weight's rows.
        bits: Bits of an index that the sort compares.
    """
    count, nbytes = indices.numel(), indices.itemsize
    gradient: Any = call.results[0]
    rows, width = gradient.shape
    positions, order = Temporary(count * nbytes), Temporary(count * nbytes)
    numbers = Temporary(count * nbytes)
    sorting = Temporary(
        pairs_bytes(count, nbytes, bits, call.processors, index_bytes=nbytes)
    )
    yield from (positions, order, numbers, sorting, Free(sorting), Free(numbers))
    if call["scale_grad_by_freq"]:
        yield Temporary(count * nbytes)
        for _way in ("forth", "back"):
            scan = Temporary(scan_by_key_bytes(count, nbytes, call.processors))
            yield from (scan, Free(scan))
    yield Results()
    yield Temporary(count * nbytes)
    yield Temporary(INDEX_BYTES)
    keys = Temporary(count * nbytes)
    unique = Temporary(unique_bytes(count, nbytes, call.processors))
    yield from (keys, unique, Free(unique), Free(keys))
    found, of_parts = parts(count, rows)
    for _each in ("parts of a row", "where they begin"):
        yield Temporary(found * nbytes)
    scan = Temporary(scan_bytes(found, nbytes, is_plain=True))
    yield from (scan, Free(scan))
    yield Temporary(INDEX_BYTES)
    yield Temporary(of_parts * nbytes)
    wide = torch.float32 if gradient.dtype in HALVES else gradient.dtype
    is_bag = call.name != "embedding_dense_backward"
    if is_bag or not add_to_rows(count, rows, width, call.processors):
        yield Temporary(of_parts * width * wide.itemsize)
        return
    yield Temporary(of_parts * nbytes)
    if wide is not gradient.dtype:
        yield copy_of(gradient, wide)


register(
    "embedding_dense_backward",
    requests=_gradient,
    source="cuda/Embedding.cu, embedding_dense_backward_cuda; "
    "cuda/EmbeddingBackwardKernel.cu, embedding_backward_cuda_kernel",
)

#: ``EmbeddingBagMode`` of ``EmbeddingBag.h``.
_MAX: Final = 2


def _bags(func: Any) -> Any:
    """Return a function that also computes the bag of each index and each bag's size.

    A card returns both; the CPU's kernels omit results that their gradients do not need.
    """

    def compute(  # noqa: PLR0917  # the operator's signature
        weight: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor,
        scale_grad_by_freq: bool = False,  # noqa: FBT001, FBT002
        mode: int = 0,
        sparse: bool = False,  # noqa: FBT001, FBT002
        per_sample_weights: torch.Tensor | None = None,
        include_last_offset: bool = False,  # noqa: FBT001, FBT002
        padding_idx: int = -1,
    ) -> Any:
        require_type(weight.dtype, per_sample_weights)
        found = func(
            weight,
            indices,
            offsets,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
        if weight.is_meta:
            return found
        kind = torch.promote_types(indices.dtype, offsets.dtype)
        starts = offsets[:-1] if include_last_offset else offsets
        positions = torch.arange(indices.numel())
        bags = torch.searchsorted(starts.long(), positions, right=True) - 1
        bags = bags.clamp_min(0)  # the first bag begins at 0, whatever the offsets are
        sizes = torch.zeros(offsets.numel(), dtype=torch.int64)
        sizes.index_add_(0, bags, (indices != padding_idx).long())
        largest = found[3] if mode == _MAX else found[3].new_empty(0)
        return found[0], bags.to(kind), sizes.to(kind), largest.to(kind)

    return compute if func._overloadname == "default" else None


def _filling_bags(call: Call) -> Iterator[RequestStep]:
    """Request the memory of an embedding bag.

    Indices and offsets are converted to one dtype. Sizes, bags, the output and the
    indices of the maxima follow.
    """
    kinds = [call["indices"].dtype, call["offsets"].dtype]
    kind = torch.promote_types(*kinds)
    for name, each in zip(("indices", "offsets"), kinds, strict=True):
        if each is not kind:
            yield copy_of(call[name], kind)
    yield Results(2)
    yield Results(1)
    yield Results(0)


register(
    "_embedding_bag _embedding_bag_forward_only",
    compute=_bags,
    requests=_filling_bags,
    source="cuda/EmbeddingBag.cu, _embedding_bag_cuda",
)


def _gradient_of_bags(call: Call) -> Iterator[RequestStep]:
    if not call["grad"].is_contiguous():
        yield copy_of(call["grad"])
    indices: torch.Tensor = call["indices"]
    if call["mode"] != _MAX and indices.numel():
        yield from _sorted(call, indices, call["num_weights"].bit_length())
    yield Results()


def _takes_largest(func: Any, args: tuple[Any, ...], _options: dict[str, Any]) -> bool:
    names = [each.name for each in func._schema.arguments]
    return bool(args[names.index("mode")] == _MAX)


register(
    "_embedding_bag_backward _embedding_bag_dense_backward",
    requests=_gradient_of_bags,
    alert="embedding_bag_backward_cuda_max",
    alerts=_takes_largest,
    source="cuda/EmbeddingBag.cu, embedding_bag_backward_cuda_sum_avg and _max; "
    "EmbeddingBag.cpp, _embedding_bag_backward",
)
