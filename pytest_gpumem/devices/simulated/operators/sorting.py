"""Operators that sort, select by rank, and count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import COMPLEX, HALVES, lacking
from pytest_gpumem.devices.simulated.operators.checks import are_formulas_active
from pytest_gpumem.devices.simulated.operators.composing import (
    into_out,
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
    packed,
)
from pytest_gpumem.kernels.sort_memory import (
    INDEX_BYTES,
    SELECTION_SCAN_BYTES,
    pairs_bytes,
    segmented_bytes,
    segments_bytes,
    selection_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep


def _quantile(func: Any) -> Any:
    """Compose quantiles of other operators, as C++ does for tensors that are on a card.

    Under a transform they are computed on the host as a whole.
    """
    into = into_out(func, keeps_strides=False)
    if into is not None:
        return into
    host = on_host(func)

    def kernel(
        source: torch.Tensor,
        share: Any,
        dim: int | None = None,
        keepdim: bool = False,  # noqa: FBT001, FBT002  # the operator's signature
        *,
        interpolation: str = "linear",
    ) -> Any:
        if isinstance(share, torch.Tensor) and share.device != source.device:
            raise RuntimeError(
                "quantile() q tensor must be on the same device as the input tensor"
            )
        if are_formulas_active():
            return host(source, share, dim, keepdim, interpolation=interpolation)
        # C++ checks the other arguments here, and gives the shape of the result.
        shaped = [
            torch.empty(each.shape, dtype=each.dtype, device="meta")
            if isinstance(each, torch.Tensor)
            else each
            for each in (source, share)
        ]
        shape = func(*shaped, dim, keepdim, interpolation=interpolation).shape
        if not isinstance(share, torch.Tensor):
            share = torch.full((), share, dtype=source.dtype, device=source.device)
        shape = shape[1:] if share.dim() else shape
        if dim is None:
            ordered = source.flatten().sort()[0]
        else:
            ordered = source.unsqueeze(-1).transpose(dim % max(source.dim(), 1), -1)
            is_last = not source.dim() or dim % source.dim() == source.dim() - 1
            ordered = (source if is_last else ordered).sort()[0]
        ordered = ordered.view(*shape, ordered.shape[-1] if ordered.dim() else 1)
        ranks = _ranks(ordered, share, skips="nan" in func._schema.name)
        found = _at_ranks(ordered, ranks, interpolation)
        if not share.dim():
            return found.squeeze_(-1)
        return found.unsqueeze_(0).transpose_(0, -1).squeeze_(-1)

    return kernel


def _ranks(ordered: torch.Tensor, share: torch.Tensor, *, skips: bool) -> torch.Tensor:
    """Return the ranks of quantiles among ordered numbers; they may be fractions.

    Args:
        ordered: The numbers, sorted along the last dimension.
        share: The quantiles.
        skips: Whether NaN are ignored.
    """
    if skips:
        counts = ordered.isnan().logical_not_().sum(-1, keepdim=True) - 1
        ranks: torch.Tensor = share * counts
        return ranks.masked_fill_(ranks < 0, 0)
    last = ordered.shape[-1] - 1
    ranks, are_none = torch.broadcast_tensors(
        share * last, ordered.isnan().any(-1, keepdim=True)
    )
    found: torch.Tensor = ranks.masked_fill(are_none, last)
    return found


def _at_ranks(
    ordered: torch.Tensor, ranks: torch.Tensor, interpolation: str
) -> torch.Tensor:
    """Return the numbers at some ranks, interpolated between neighbours."""
    {"lower": ranks.floor_, "higher": ranks.ceil_, "nearest": ranks.round_}.get(
        interpolation, lambda: ranks
    )()
    below = ranks.long()
    found = ordered.gather(-1, below)
    if interpolation in {"linear", "midpoint"}:
        is_middle = interpolation == "midpoint"
        weights = torch.full_like(ranks, 0.5) if is_middle else ranks - below
        above = ranks.ceil_().long()
        found.lerp_(ordered.gather(-1, above), weights)
    return found


register(
    "nanquantile quantile",
    composed=_quantile,
    source="Sorting.cpp, quantile_compute: it reads values of the host's tensors",
)
register("msort", composed=into_out, source="Sorting.cpp, msort_out")

#: Length of the longest dimension that is sorted in place.
#: Source: ``should_use_small_sort``.
_SMALL = 4096
#: Segments of at least ``_LARGE_SEGMENT`` numbers are sorted one at a time. At least
#: ``_MANY_SEGMENTS`` shorter segments are sorted by a segmented sort.
#: Source: ``launch_stable_sort_kernel``.
_MANY_SEGMENTS = 128
_LARGE_SEGMENT = 1_000_000


def _sorting(call: Call) -> Iterator[RequestStep]:
    source, dim = call["self"], call.get("dim", -1)
    yield Results()
    if source.dim() == 0 or not source.numel():
        return
    length = source.shape[dim]
    if length <= _SMALL:
        yield Temporary(length * INDEX_BYTES)
        return
    copy = copy_of(source)
    is_copied = source.stride(dim) != 1 or not source.is_contiguous()
    if is_copied:
        yield copy
    yield from _sorting_segments(call, source, length)


def _sorting_segments(
    call: Call, source: torch.Tensor, length: int
) -> Iterator[RequestStep]:
    """Request the memory to sort the last dimension: ``launch_stable_sort_kernel``."""
    count, key_bytes = source.numel(), source.itemsize
    bits = 8 * key_bytes
    segments = count // length
    indices = Temporary(count * INDEX_BYTES)
    yield indices
    if segments == 1 or length >= _LARGE_SEGMENT:
        found = Temporary(pairs_bytes(count, key_bytes, bits, call.processors))
        yield found
        yield Free(found)
    elif segments < _MANY_SEGMENTS:
        numbers, values = Temporary(count * INDEX_BYTES), copy_of(source)
        found = Temporary(pairs_bytes(count, key_bytes, bits, call.processors))
        yield from (numbers, values, found, Free(found), Free(values))
        found = Temporary(segments_bytes(count, segments, call.processors))
        yield from (found, Free(found), Free(numbers))
    else:
        found = Temporary(segmented_bytes(count, key_bytes))
        yield from (found, Free(found))
    yield Free(indices)


register("sort", requests=_sorting, source="cuda/Sort.cpp, sort_stable_out")


def _sorting_away(call: Call) -> Iterator[RequestStep]:
    """Request a temporary buffer for sorted values; only the indices are returned."""
    values = copy_of(call["self"])
    yield values
    yield from _sorting(call)


register(
    "argsort",
    requests=_sorting_away,
    source="Sorting.cpp, argsort; cuda/Sort.cpp, sort_stable_out",
)


def _middle(call: Call) -> Iterator[RequestStep]:
    """Request the memory to sort all numbers; with a dimension, nothing is sorted."""
    source = call["self"]
    if call.overload != "default" or not source.numel():
        return
    values = copy_of(source)
    indices = Temporary(source.numel() * INDEX_BYTES)
    yield from (values, indices)
    if source.numel() <= _SMALL:
        positions = Temporary(source.numel() * INDEX_BYTES)
        yield from (positions, Free(positions))
    else:
        yield from _sorting_segments(call, source, source.numel())
    yield Free(indices)
    if call.name == "nanmedian":
        yield from _counting_numbers(source.numel())
    else:
        yield Temporary(1)
    yield Results()


def _counting_numbers(count: int) -> Iterator[RequestStep]:
    """Request the memory of the index ``((count - 1) - sorted.isnan().sum()) / 2``."""
    are_none, wide = Temporary(count), Temporary(count * INDEX_BYTES)
    total, left = Temporary(INDEX_BYTES), Temporary(INDEX_BYTES)
    half, index = Temporary(4), Temporary(INDEX_BYTES)  # single precision
    yield from (are_none, total, wide, Free(wide), left, half, index)
    yield from (Free(half), Free(left), Free(total), Free(are_none))


def _median(func: Any) -> Any:
    """Return the median of booleans, too, which the CPU refuses; a card sorts first."""
    if func._overloadname != "default":
        return None

    def compute(source: torch.Tensor) -> torch.Tensor:
        if source.is_complex():
            # The text of a card's error.
            raise RuntimeError(" Sort does not support complex dtypes on CPU")
        if source.dtype is not torch.bool:
            return func(source)  # type: ignore[no-any-return]  # the operator returns a tensor
        return func(source.byte()).bool()  # type: ignore[no-any-return]  # the operator returns a tensor

    return compute


def _returns_indices(func: Any, *_call: Any) -> bool:
    return len(func._schema.returns) > 1


register(
    "median nanmedian",
    requests=_middle,
    compute=_median,
    alert="median CUDA with indices output",
    alerts=_returns_indices,
    source="cuda/Sorting.cpp, median_with_indices_impl",
)


def _histc(source: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Run ``histc``; only a card supports integers."""
    if source.dtype.is_floating_point:
        return torch.histc(source, *args, **options)
    return torch.histc(source.double(), *args, **options).to(source.dtype)


register(
    "bincount",
    alert="_bincount_cuda",
    alerts=lambda _func, args, _options: len(args) > 1 and args[1] is not None,
    source="cuda/SummaryOps.cu, _bincount_cuda",
)
register(
    "histc",
    alert="_histc_cuda with floating point input",
    alerts=lambda _func, args, _options: bool(args[0].is_floating_point()),
    compute=only(_histc),
    lacks=lacking("histc", HALVES | COMPLEX | {torch.bool}),
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


def _searching(call: Call) -> Iterator[RequestStep]:
    """Request the smallest and the largest index of a sorter, which are checked."""
    if call.get("sorter") is not None:
        least, largest = Temporary(INDEX_BYTES), Temporary(INDEX_BYTES)
        yield from (least, largest, Free(least), Free(largest))


register(
    "searchsorted",
    requests=_searching,
    source="BucketizationUtils.h, searchsorted_pre_check",
)


def _choosing(call: Call) -> Iterator[RequestStep]:
    """Request the memory of ``topk`` for long rows: several blocks count digits."""
    source: torch.Tensor = call["self"]
    yield Results()
    if not source.dim() or not source.numel():
        return
    yield packed(source)
    length = source.shape[call["dim"]]
    slices = source.numel() // length
    found = selection_bytes(slices, length, source.itemsize, call.processors)
    yield from map(Temporary, found)
    for _each in range(2 if found else 0):
        scan = Temporary(SELECTION_SCAN_BYTES)
        yield from (scan, Free(scan))


register("topk", requests=_choosing, source="cuda/TensorTopK.cu, mbtopk::launch")
