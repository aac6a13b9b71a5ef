"""The C++ functions of ``torch.nn.parallel.comm``, for the cards of one process.

They broadcast, scatter and gather with the checks and the requests of the C++ code.
Where that code uses NCCL to copy between cards, a plain copy is made here.

Source: ``torch/csrc/cuda/comm.cpp``.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._prims_common import canonicalize_dim
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from pytest_gpumem.devices.simulated.machine import card_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def _require(holds: Any, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _device(index: int) -> torch.device:
    """Return a card's device."""
    _require(index >= 0, f"Expected non-negative device index, but got {index}")
    return torch.device("cuda", card_of(index).index)


def _require_card(out: torch.Tensor, index: int) -> None:
    _require(
        out.is_cuda,
        "Expected all output tensors to be CUDA tensors, but output tensor at index "
        f"{index} has device '{out.device}'",
    )


def broadcast(tensor: torch.Tensor, devices: Sequence[int]) -> list[torch.Tensor]:
    """Return a copy for each card; for the tensor's own card, the tensor itself."""
    targets = [_device(index) for index in devices]
    return [
        tensor
        if target == tensor.device
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=target).copy_(tensor)
        for target in targets
    ]


def broadcast_out(
    tensor: torch.Tensor, out: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Copy a tensor into each of the given tensors."""
    for index, target in enumerate(out):
        _require_card(target, index)
        _require(
            target.shape == tensor.shape,
            "Expected all output tensors to have same shape as the source tensor "
            f"{list(tensor.shape)}, but output tensor at index {index} has shape "
            f"{list(target.shape)}",
        )
    for target in out:
        target.copy_(tensor)
    return out


def broadcast_coalesced(
    tensors: Sequence[torch.Tensor], devices: Sequence[int], buffer_size: int
) -> list[list[torch.Tensor]]:
    """Return copies of all tensors for each card; for the first card, the originals.

    The copies on a card are pieces of larger tensors of up to ``buffer_size`` bytes.
    """
    _require(
        all(each.get_device() == devices[0] for each in tensors),
        f"All tensors must be on devices[0]: {devices[0]}",
    )
    copies = [list(tensors) for _ in devices]
    for indices in _chunks(tensors, buffer_size):
        chunk = [tensors[index] for index in indices]
        flat = broadcast(_flatten_dense_tensors(chunk), devices)
        for kept, each in zip(copies[1:], flat[1:], strict=True):
            pieces = _unflatten_dense_tensors(each, chunk)
            for index, piece in zip(indices, pieces, strict=True):
                kept[index] = piece.data
    return copies


def _chunks(tensors: Sequence[torch.Tensor], limit: int) -> Iterator[list[int]]:
    """Yield the indices of tensors of one dtype that together have ``limit`` bytes.

    Source: ``take_tensors`` of ``torch/csrc/utils/tensor_flatten.cpp``.
    """
    groups: dict[torch.dtype, list[int]] = {}
    nbytes: Counter[torch.dtype] = Counter()
    for index, tensor in enumerate(tensors):
        dtype = tensor.dtype
        groups.setdefault(dtype, []).append(index)
        nbytes[dtype] += tensor.nbytes
        if nbytes[dtype] >= limit:
            yield groups.pop(dtype)
            del nbytes[dtype]
    yield from groups.values()


def scatter(
    tensor: torch.Tensor,
    devices: Sequence[int],
    chunk_sizes: Sequence[int] | None,
    dim: int,
    streams: Sequence[Any] | None,
) -> list[torch.Tensor]:
    """Return a piece of a tensor for each card."""
    _require(devices, "Expected at least one device to scatter to")
    if chunk_sizes is None:
        pieces = list(tensor.chunk(len(devices), dim))
    else:
        _require(
            len(chunk_sizes) == len(devices),
            "Expected devices and chunk_sizes to be of same length, but got len(devices) "
            f"= {len(devices)} and len(chunk_sizes) = {len(chunk_sizes)}",
        )
        pieces = list(tensor.split_with_sizes(list(chunk_sizes), dim))
    with ExitStack() as on_streams:
        for index, piece in enumerate(pieces):
            if devices[index] != tensor.get_device():
                _enter(on_streams, streams, index, devices[index])
                pieces[index] = piece.to(_device(devices[index]))
    return pieces


def scatter_out(
    tensor: torch.Tensor,
    out: Sequence[torch.Tensor],
    dim: int,
    streams: Sequence[Any] | None,
) -> Sequence[torch.Tensor]:
    """Copy the pieces of a tensor into the given tensors."""
    _require(out, "Expected at least one output tensor to scatter to")
    dim = canonicalize_dim(tensor.dim(), dim)
    for index, target in enumerate(out):
        _require_card(target, index)
        wanted = list(target.shape)
        if target.dim() == tensor.dim():
            wanted[dim] = tensor.size(dim)
        _require(
            wanted == list(tensor.shape),
            f"Output tensor at index {index} has incorrect shape: {list(target.shape)}. "
            f"Expected same shape except for scatter dim {dim} as the source tensor: "
            f"{list(tensor.shape)}",
        )
    sizes = [target.size(dim) for target in out]
    _require(
        sum(sizes) == tensor.size(dim),
        f"Total size for output tensors along scatter dim {dim} does not match the source "
        f"tensor size at dim {dim}. Expected {tensor.size(dim)}, but got total size "
        f"{sum(sizes)}",
    )
    with ExitStack() as on_streams:
        for index, piece in enumerate(tensor.split_with_sizes(sizes, dim)):
            _enter(on_streams, streams, index, out[index].get_device())
            out[index].copy_(piece)
    return out


def gather(
    tensors: Sequence[torch.Tensor], dim: int, destination: int | None
) -> torch.Tensor:
    """Return the tensors of several cards joined into one, on one card or the host."""
    shape = _gathered_shape(tensors, dim, quote="")
    target = torch.device("cpu")
    if destination != -1:
        target = torch.device("cuda", card_of(destination).index)
    # The format of the first tensor, if all have it. Source: ``suggest_memory_format``.
    first = tensors[0]
    layout = next(
        (
            each
            for each in (torch.channels_last, torch.channels_last_3d)
            if first.dim() == (4 if each is torch.channels_last else 5)
            and all(one.is_contiguous(memory_format=each) for one in tensors)
            and not first.is_contiguous()
        ),
        torch.contiguous_format,
    )
    out = torch.empty(shape, dtype=first.dtype, device=target, memory_format=layout)
    return _gather_into(tensors, out, dim)


def gather_out(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, dim: int
) -> torch.Tensor:
    """Copy the tensors of several cards into one given tensor."""
    shape = _gathered_shape(tensors, dim, quote="'")
    _require(
        list(out.shape) == shape,
        f"Expected out tensor to have shape {shape}, but got {list(out.shape)}",
    )
    return _gather_into(tensors, out, dim)


def _gather_into(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, dim: int
) -> torch.Tensor:
    sizes = [tensor.size(dim) for tensor in tensors]
    pieces = out.split_with_sizes(sizes, dim)
    for target, tensor in zip(pieces, tensors, strict=True):
        target.copy_(tensor)
    return out


def _gathered_shape(
    tensors: Sequence[torch.Tensor], dim: int, *, quote: str
) -> list[int]:
    """Return the shape of the tensors joined along a dimension."""
    _require(tensors, "Expected at least one tensor to gather from")
    wanted = list(tensors[0].shape)
    dim = canonicalize_dim(len(wanted), dim)
    for index, tensor in enumerate(tensors):
        _require(
            tensor.is_cuda,
            "Expected all input tensors to be CUDA tensors, but tensor at index "
            f"{index} has device {quote}{tensor.device}{quote}",
        )
        _require(
            tensor.dim() == len(wanted),
            "Expected all input tensors to have the same number of dimensions, but tensor "
            f"at index {index}has {tensor.dim()} dimensions, (expected {len(wanted)})",
        )
        wanted[dim] = tensor.size(dim)
        _require(
            list(tensor.shape) == wanted,
            f"Input tensor at index {index} has invalid shape {list(tensor.shape)}, but "
            f"expected {wanted}",
        )
    wanted[dim] = sum(tensor.size(dim) for tensor in tensors)
    return wanted


def _enter(
    on_streams: ExitStack, streams: Sequence[Any] | None, index: int, card: int
) -> None:
    """Make the stream of a piece the current stream, also for the pieces after it."""
    stream = streams[index] if streams is not None and index < len(streams) else None
    if stream is None:
        return
    _require(
        stream.device_index == card,
        f"Expected the device associated with the stream at index {index} (was "
        f"{stream.device_index}) to match the device supplied at that index (expected "
        f"{card})",
    )
    on_streams.enter_context(torch.cuda.stream(stream))


C_COLLECTIVES: Final[dict[str, Any]] = {
    "_broadcast": broadcast,
    "_broadcast_out": broadcast_out,
    "_broadcast_coalesced": broadcast_coalesced,
    "_scatter": scatter,
    "_scatter_out": scatter_out,
    "_gather": gather,
    "_gather_out": gather_out,
}
