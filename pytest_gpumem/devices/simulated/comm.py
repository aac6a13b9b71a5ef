"""The C++ functions of ``torch.nn.parallel.comm``, for the cards of one process.

They broadcast, scatter and gather by copies from card to card. Source:
``torch/csrc/cuda/comm.cpp``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.machine import card_of

if TYPE_CHECKING:
    from collections.abc import Sequence


def _device(index: int) -> torch.device:
    """Return a card's device; an index of -1 means the host, as in C++."""
    if index < 0:
        return torch.device("cpu")
    return torch.device("cuda", card_of(index).index)


def broadcast(tensor: torch.Tensor, devices: Sequence[int]) -> list[torch.Tensor]:
    """Return a copy for each card; for the tensor's own card, the tensor itself."""
    return [tensor.to(_device(index)) for index in devices]


def broadcast_out(
    tensor: torch.Tensor, out: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Copy a tensor into each of the given tensors."""
    for target in out:
        target.copy_(tensor)
    return out


def broadcast_coalesced(
    tensors: Sequence[torch.Tensor],
    devices: Sequence[int],
    buffer_size: int,  # noqa: ARG001  # torch's signature
) -> list[list[torch.Tensor]]:
    """Return copies of all tensors for each card; for the first card, the originals."""
    return [[tensor.to(_device(index)) for tensor in tensors] for index in devices]


def scatter(
    tensor: torch.Tensor,
    devices: Sequence[int],
    chunk_sizes: Sequence[int] | None,
    dim: int,
    streams: Any,  # noqa: ARG001  # torch's signature; work is complete when a call returns
) -> list[torch.Tensor]:
    """Return a piece of a tensor for each card."""
    pieces = _pieces(tensor, len(devices), chunk_sizes, dim)
    return [
        piece.to(_device(index)) for piece, index in zip(pieces, devices, strict=False)
    ]


def scatter_out(
    tensor: torch.Tensor,
    out: Sequence[torch.Tensor],
    dim: int,
    streams: Any,  # noqa: ARG001  # torch's signature
) -> Sequence[torch.Tensor]:
    """Copy the pieces of a tensor into the given tensors."""
    sizes = [target.size(dim) for target in out]
    for target, piece in zip(out, tensor.split(sizes, dim), strict=True):
        target.copy_(piece)
    return out


def gather(
    tensors: Sequence[torch.Tensor], dim: int, destination: int | None
) -> torch.Tensor:
    """Return the tensors of several cards joined into one, on one card or the host."""
    goal = _device(card_of(None).index if destination is None else destination)
    return torch.cat([tensor.to(goal) for tensor in tensors], dim)


def gather_out(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, dim: int
) -> torch.Tensor:
    """Copy the tensors of several cards into one given tensor."""
    sizes = [tensor.size(dim) for tensor in tensors]
    for target, tensor in zip(out.split(sizes, dim), tensors, strict=True):
        target.copy_(tensor)
    return out


def _pieces(
    tensor: torch.Tensor, count: int, sizes: Sequence[int] | None, dim: int
) -> Sequence[torch.Tensor]:
    if sizes is None:
        return tensor.chunk(count, dim)
    pieces: Sequence[torch.Tensor] = tensor.split(list(sizes), dim)
    return pieces


C_COLLECTIVES: Final[dict[str, Any]] = {
    "_broadcast": broadcast,
    "_broadcast_out": broadcast_out,
    "_broadcast_coalesced": broadcast_coalesced,
    "_scatter": scatter,
    "_scatter_out": scatter_out,
    "_gather": gather,
    "_gather_out": gather_out,
}
