"""What C++ does for parallel modules: copies between cards, and buckets on them.

Below ``torch.nn.parallel.comm`` it broadcasts, scatters and gathers between the cards
of one process; here copies from card to card do. Source: ``torch/csrc/cuda/comm.cpp``.

For ``DistributedDataParallel`` it makes buckets of gradients on what it takes for the
parameters' device. Source: ``initialize_buckets`` and ``initialize_local_used_map`` of
``torch/csrc/distributed/c10d/reducer.cpp``.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.refusals import refused
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def _device(index: int) -> torch.device:
    """Return a card's device; an index of -1 is the host, as in C++."""
    if index < 0:
        return torch.device("cpu")
    return torch.device("cuda", card_of(index).index)


def broadcast(tensor: torch.Tensor, devices: Sequence[int]) -> list[torch.Tensor]:
    """Return a copy for each card; on its own card the tensor itself."""
    return [tensor.to(_device(index)) for index in devices]


def broadcast_out(
    tensor: torch.Tensor, out: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor]:
    """Copy a tensor into others."""
    for target in out:
        target.copy_(tensor)
    return out


def broadcast_coalesced(
    tensors: Sequence[torch.Tensor],
    devices: Sequence[int],
    buffer_size: int,  # noqa: ARG001  # torch's signature
) -> list[list[torch.Tensor]]:
    """Return copies of all tensors for each card; for the first the tensors."""
    return [[tensor.to(_device(index)) for tensor in tensors] for index in devices]


def scatter(
    tensor: torch.Tensor,
    devices: Sequence[int],
    chunk_sizes: Sequence[int] | None,
    dim: int,
    streams: Any,  # noqa: ARG001  # torch's signature; work is done when a call returns
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
    """Copy the pieces of a tensor into others."""
    sizes = [target.size(dim) for target in out]
    for target, piece in zip(out, tensor.split(sizes, dim), strict=True):
        target.copy_(piece)
    return out


def gather(
    tensors: Sequence[torch.Tensor], dim: int, destination: int | None
) -> torch.Tensor:
    """Return tensors of several cards as one, on one card or the host."""
    goal = _device(card_of(None).index if destination is None else destination)
    return torch.cat([tensor.to(goal) for tensor in tensors], dim)


def gather_out(
    tensors: Sequence[torch.Tensor], out: torch.Tensor, dim: int
) -> torch.Tensor:
    """Copy tensors of several cards into one."""
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


# -- torch.distributed ----------------------------------------------------------------


class _Placing(TorchDispatchMode):
    """A block in which memory that C++ asks for on the host is a card's."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Ask for the memory on the card."""
        options = kwargs or {}
        asked = options.get("device")
        if func is _empty and asked is not None and asked.type == "cpu":
            options = {**options, "device": self._device}
        return func(*args, **options)


_empty: Final = torch.ops.aten.empty.memory_format


def _of_distributed() -> tuple[tuple[Any, str, Any], ...]:
    """Return owner, name and replacement of what torch.distributed calls."""
    if not torch.distributed.is_available():
        return ()
    original: Any = vars(torch.distributed)["Reducer"]

    class Reducer(original):  # type: ignore[misc]  # a class of C++
        """``torch.distributed.Reducer``, whose buckets are where the parameters are."""

        def __init__(self, params: Any, *args: Any, **options: Any) -> None:
            __tracebackhide__ = True
            cards = [
                each.device for each in params if isinstance(each, SimulatedTensor)
            ]
            self._place = _Placing(cards[0]) if cards else nullcontext()
            with self._place:
                super().__init__(params, *args, **options)

        def _rebuild_buckets(self) -> Any:
            __tracebackhide__ = True
            with self._place:
                return super()._rebuild_buckets()

    c10d: Any = torch.distributed.distributed_c10d
    new_group: Any = c10d._new_process_group_helper

    @functools.wraps(new_group)
    def new_process_group(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        try:
            return new_group(*args, **options)
        except (RuntimeError, ValueError) as error:
            if "NCCL" not in str(error):
                raise
            refusal = refused("torch.distributed's nccl backend")
        raise refusal  # without torch's text before it

    return (
        (torch.distributed, "Reducer", Reducer),
        (c10d, "_new_process_group_helper", new_process_group),
    )


#: Owner, name and replacement of each.
REPLACEMENTS: Final = _of_distributed()
