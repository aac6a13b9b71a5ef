"""Puts the buckets of ``DistributedDataParallel`` on the cards of the parameters.

C++ creates buckets on the device that it sees for the parameters, which for a simulated
tensor is the host. Source: ``initialize_buckets``, ``initialize_local_used_map`` and
``compute_bucket_assignment_by_size`` of ``torch/csrc/distributed/c10d/reducer.cpp``.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Sequence

_empty: Final = torch.ops.aten.empty.memory_format
#: The device types of values, with and without computed values.
_HOST: Final = ("cpu", "meta")


class _Placing(TorchDispatchMode):
    """A mode in which memory that C++ requests on the host is taken on a card.

    Args:
        devices: The card of each request, in order; the last card serves all later ones.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no type hints here
        self._devices = deque(devices)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Request the memory on the card."""
        options = kwargs or {}
        asked = options.get("device")
        if func is _empty and asked is not None and asked.type in _HOST:
            device = self._devices[0]
            if len(self._devices) > 1:
                self._devices.popleft()
            options = {**options, "device": device}
        return func(*args, **options)


def _device_of(tensor: torch.Tensor) -> torch.device | None:
    """Return the card of a tensor, or None for a tensor on the host."""
    return tensor.device if isinstance(tensor, SimulatedTensor) else None


_Reducer: Final[Any] = vars(dist)["Reducer"]
_assign: Final[Any] = vars(dist)["_compute_bucket_assignment_by_size"]
_broadcast_all: Final[Any] = vars(dist)["_broadcast_coalesced"]
_verify: Final[Any] = vars(dist)["_verify_params_across_processes"]


class Reducer(_Reducer):  # type: ignore[misc]  # the base is a C++ class
    """``torch.distributed.Reducer`` with buckets on the parameters' cards.

    Limits: if parameters are on several cards, buckets are not rebuilt in the order of the
    first backward, because C++ would put several cards in one bucket. The bytes of the
    buckets are the same.
    """

    def __init__(
        self, params: Any, bucket_indices: Any, *args: Any, **options: Any
    ) -> None:
        cards = [device for device in map(_device_of, params) if device is not None]
        self._cards = sorted({each.index for each in cards})
        self._first = cards[0] if cards else None
        if self._first is None:
            super().__init__(params, bucket_indices, *args, **options)
            return
        flags = args[2:3] or (options.get("expect_sparse_gradients"),)
        expects_sparse = flags[0] or [False] * len(params)
        own = [
            _device_of(params[indices[0]]) or torch.device("cpu")
            for indices in bucket_indices
            if not expects_sparse[indices[0]]
        ]
        with _Placing([*own, self._first]):
            super().__init__(params, bucket_indices, *args, **options)

    def _set_static_graph(self) -> None:
        if self._first is None:
            super()._set_static_graph()
            return
        with _Placing([self._first]):
            super()._set_static_graph()

    def _rebuild_buckets(self) -> Any:
        if self._first is None:
            return super()._rebuild_buckets()
        if len(self._cards) > 1:
            return False
        with _Placing([self._first]):
            return super()._rebuild_buckets()


def _by_card(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the positions of tensors, grouped by card."""
    found: dict[torch.device | None, list[int]] = {}
    for position, tensor in enumerate(tensors):
        found.setdefault(_device_of(tensor), []).append(position)
    return list(found.values())


def assign_buckets(
    tensors: Sequence[torch.Tensor],
    bucket_size_limits: Sequence[int],
    expect_sparse_gradient: Sequence[bool] = (),
    tensor_indices: Sequence[int] = (),
    logger: Any = None,
) -> tuple[list[list[int]], list[int]]:
    """Return the tensors and the limit of each bucket; no bucket has two cards."""
    parts = _by_card(tensors)
    if len(parts) == 1:
        assigned: tuple[list[list[int]], list[int]] = _assign(
            tensors, bucket_size_limits, expect_sparse_gradient, tensor_indices, logger
        )
        return assigned
    buckets: list[tuple[list[int], int]] = []
    for positions in parts:
        indices, limits = _assign(
            [tensors[each] for each in positions],
            bucket_size_limits,
            [expect_sparse_gradient[each] for each in positions]
            if expect_sparse_gradient
            else [],
            [],
            logger,
        )
        buckets += [
            ([positions[each] for each in bucket], limit)
            for bucket, limit in zip(indices, limits, strict=True)
        ]
    buckets.sort(key=lambda each: min(each[0]))
    if tensor_indices:
        buckets = [
            ([tensor_indices[each] for each in bucket], limit)
            for bucket, limit in buckets
        ]
    return [bucket for bucket, _limit in buckets], [limit for _b, limit in buckets]


def broadcast_coalesced(
    process_group: Any,
    tensors: Sequence[torch.Tensor],
    buffer_size: int,
    src: int = 0,
) -> None:
    """Broadcast tensors in pieces of limited bytes; no piece has two cards."""
    for positions in _by_card(tensors):
        _broadcast_all(
            process_group, [tensors[each] for each in positions], buffer_size, src
        )


def verify_params(
    process_group: Any, params: Sequence[torch.Tensor], logger: Any = None
) -> None:
    """Check that all ranks have the same number, sizes and strides of parameters.

    Source: ``verify_params_across_processes``, which sends numbers on the device of the
    first parameter.

    Raises:
        RuntimeError: The ranks' parameters differ.
    """
    device = _device_of(params[0]) if params else None
    if device is None:
        _verify(process_group, params, logger)
        return
    if card_of(device.index).value_device == "meta":
        return  # no rank has values to compare
    rank, own = process_group.rank(), len(params)
    count = torch.tensor([own], device=device)
    counts = [torch.empty_like(count) for _ in range(process_group.size())]
    process_group.allgather([counts], [count]).wait()
    for other, each in enumerate(counts):
        if int(each) != own:
            raise RuntimeError(
                "DDP expects same model across all ranks, but Rank "
                f"{rank} has {own} params, while rank {other} has inconsistent "
                f"{int(each)} params."
            )
    shapes = [("sizes", list(each.shape)) for each in params]
    strides = [("strides", list(each.stride())) for each in params]
    pairs = list(zip(shapes, strides, strict=True))
    numbers = [each for pair in pairs for _name, found in pair for each in found]
    first = torch.tensor(numbers, dtype=torch.int64, device=device)
    options = c10d.BroadcastOptions()
    process_group.broadcast([first], options).wait()
    expected = iter(first.tolist())
    for index, pair in enumerate(pairs):
        for name, found in pair:
            if found != [next(expected) for _ in found]:
                raise RuntimeError(
                    f"[{rank}]: params[{index}] in this process with {name} {found} "
                    f"appears not to match {name} of the same param in process 0."
                )


#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[list[tuple[Any, str, Any]]] = [
    (dist, "Reducer", Reducer),
    (dist, "_compute_bucket_assignment_by_size", assign_buckets),
    (dist, "_broadcast_coalesced", broadcast_coalesced),
    (dist, "_verify_params_across_processes", verify_params),
]
