"""Tensors and events of a card that other processes receive (CUDA IPC).

Note [Memory that processes share]
The values of a sent tensor are in host memory that processes share, so that each
process sees what another writes. The card's bytes count for the sender. A receiver
holds only the bytes of its context. If the sender deletes its storage, the block is
kept until every receiver has deleted its own; it is then freed by the next deletion of
a sent storage, by ``torch.cuda.ipc_collect``, or by a request that finds no free block.
Each time a storage is sent, a counter in shared memory is set to 1. The receiver sets
it to 0 when it deletes its storage.

Source: Note [CUDA IPC Refcounting implementation explained] of
``torch/csrc/CudaIPCTypes.h``, ``torch/csrc/CudaIPCTypes.cpp`` and
``torch/csrc/StorageSharing.cpp``.
"""

from __future__ import annotations

import json
import os
import weakref
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
from torch.multiprocessing import reductions
from torch.multiprocessing.reductions import StorageWeakRef

from pytest_gpumem.devices.cuda_errors import cuda_error
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.memory import HOST_ROOM, Memory, hold, memory_of
from pytest_gpumem.devices.simulated.sent_storages import (
    Counter,
    Sent,
    opened,
    shared_name,
)
from pytest_gpumem.devices.simulated.streams import Event
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor
from pytest_gpumem.files import IS_POSIX

if TYPE_CHECKING:
    from pytest_gpumem.devices.patches import PatchSet
    from pytest_gpumem.devices.simulated.card import SimulatedCard

_new: Final[Any] = torch.UntypedStorage.__new__
_original_from_cache: Final[Any] = reductions.storage_from_cache

_RECEIVED: Final = (
    "Attempted to send CUDA tensor received from another process; this is not currently "
    "supported. Consider cloning before sending."
)


class Received(Memory):
    """A storage that another process has sent; its bytes count for the sender.

    Args:
        card: The card.
        nbytes: The storage's bytes.
        counter: Tells the sender when this object is deleted.
    """

    __slots__ = ("_counter", "_pid")

    is_received: ClassVar[bool] = True

    def __init__(self, card: SimulatedCard, nbytes: int, counter: Counter) -> None:
        self.card = card
        self.nbytes = nbytes
        self.block = None
        self.sent = None
        self._counter = counter
        self._pid = os.getpid()

    def __del__(self) -> None:
        if self._pid == os.getpid():  # a forked child has not received it
            self._counter.drop()


def _sent(storage: torch.UntypedStorage, card: SimulatedCard) -> Sent:
    """Move the values of a storage to memory that processes share."""
    if card.value_device == "meta":
        return Sent()
    name = shared_name(storage)
    return Sent(name, opened(name, storage.nbytes()))


def share(self: torch.UntypedStorage) -> tuple[Any, ...]:
    """Run ``UntypedStorage._share_cuda_``: prepare a storage for another process.

    Returns:
        Device, handle of the memory, bytes, offset in the segment, name of the counters,
        index of the counter, handle of an event, and whether the event is needed.

    Raises:
        RuntimeError: Another process has sent the storage, or it is on no card (torch's
            messages).
    """
    memory = memory_of(self)
    if memory is None:
        raise RuntimeError("_share_cuda_: only available on CUDA")
    if memory.is_received:
        raise RuntimeError(_RECEIVED)
    card, block = memory.card, memory.block
    if block is None:
        return card.index, None, self.nbytes(), 0, None, 0, None, None
    if memory.sent is None:
        memory.sent = _sent(self, card)
    counter, name, index = card.machine.exchange.new_counter()
    memory.sent.counters.append(counter)
    segment = block.segment
    handle = {
        "pid": os.getpid(),
        "memory": memory.sent.name.decode(),
        "segment": segment.address,
        "is_expandable": segment.is_expandable,
    }
    return (
        card.index,
        json.dumps(handle).encode(),
        self.nbytes(),
        block.address - segment.address,
        name,
        index,
        Event(interprocess=True, device=card.index).ipc_handle(),
        True,
    )


def receive(  # torch's signature
    device: int,
    handle: bytes,
    nbytes: int,
    _offset: int,
    counters: bytes,
    index: int,
    _event: bytes,
    _needs_event: bool,  # noqa: FBT001  # torch's signature
) -> torch.UntypedStorage:
    """Run ``UntypedStorage._new_shared_cuda``: open what another process has sent.

    Raises:
        torch.AcceleratorError: This process is the sender, or the sender has ended
            (CUDA's messages).
    """
    card = card_of(device)
    card.make_context()
    found = json.loads(handle)
    if found["pid"] == os.getpid() and not found["is_expandable"]:
        # The driver's CUDA_ERROR_INVALID_CONTEXT. Source: ``cuIpcOpenMemHandle``.
        raise cuda_error("cudaErrorDeviceUninitialized")
    try:
        _check_alive(found["pid"])
        counter = card.machine.exchange.counter(counters, index)
        if card.value_device == "meta":
            storage: torch.UntypedStorage = _new(
                torch.UntypedStorage, nbytes, device="meta"
            )
        else:
            with HOST_ROOM:
                storage = opened(found["memory"].encode(), nbytes)
    except (ProcessLookupError, RuntimeError) as error:
        raise cuda_error("cudaErrorInvalidResourceHandle") from error
    known = _known(storage)
    hold(known, Received(card, nbytes, counter))
    return known


def _known(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return the Python object that C++ has for a storage; in torch 2.8 a new one."""
    found: torch.UntypedStorage = torch.UntypedStorage._new_with_weak_ptr(
        StorageWeakRef(storage).cdata
    )
    return found


class _Reference:
    """A weak reference to a storage of a card: torch's ``StorageWeakRef``.

    Two of them are equal if they refer to the same storage. In torch 2.8 a reference of
    C++ keeps the Python object, which owns the card's bytes.

    Args:
        storage: The storage.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._found = weakref.ref(storage)
        self.cdata: int = storage._cdata

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Reference) or self._found() is None:
            return self is other
        return self._found() is other._found()  # private to this class

    def __hash__(self) -> int:
        return self.cdata

    def expired(self) -> bool:
        """Return whether the storage is deleted."""
        return self._found() is None

    def storage(self) -> torch.UntypedStorage | None:
        """Return the storage; None if it is deleted."""
        found = self._found()
        return None if found is None else _known(found)


def _reference(storage: Any) -> Any:
    untyped = getattr(storage, "_untyped_storage", storage)
    if memory_of(untyped) is None:
        return StorageWeakRef(storage)
    return _Reference(untyped)


def _from_cache(kind: Any, key: Any) -> Any:
    found = reductions.shared_cache.get(key)
    if isinstance(found, _Reference):
        return found.storage()
    return _original_from_cache(kind, key)


def _check_alive(pid: int) -> None:
    """Raise an error if a sender has ended, even if its shared memory still exists.

    Raises:
        ProcessLookupError: It has ended.
    """
    if IS_POSIX:
        with suppress(PermissionError):  # a process of another user exists
            os.kill(pid, 0)


def let_go(counters: bytes, index: int) -> None:
    """Run ``UntypedStorage._release_ipc_counter_cuda``, for a storage received before."""
    with suppress(RuntimeError):  # the sender has ended
        current_machine().exchange.counter(counters, index).drop()


def collect() -> None:
    """Run ``torch._C._cuda_ipc_collect``."""
    current_machine().exchange.collect()


def _reduce(tensor: torch.Tensor) -> tuple[Any, ...]:
    rebuild, (_kind, *rest) = reductions.reduce_tensor(tensor)
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return rebuild, (torch.nn.Parameter if is_parameter else torch.Tensor, *rest)


def _reduce_event(event: Event) -> tuple[Any, ...]:
    """Do the same as torch's function, whose name is private from torch 2.15 on."""
    return reductions.rebuild_event, (event.device, event.ipc_handle())


def patch_queues(patches: PatchSet) -> None:
    """Let queues and pipes of multiprocessing carry a card's tensors and events."""
    reducers: Any = ForkingPickler._extra_reducers  # type: ignore[attr-defined]  # the dictionary that ``register`` changes
    patches.put(reducers, SimulatedTensor, _reduce)
    patches.put(reducers, Event, _reduce_event)


#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (reductions, "StorageWeakRef", _reference),
    (reductions, "storage_from_cache", _from_cache),
    (torch.UntypedStorage, "_share_cuda_", share),
    (torch.UntypedStorage, "_new_shared_cuda", staticmethod(receive)),
    (torch.UntypedStorage, "_release_ipc_counter_cuda", staticmethod(let_go)),
)
