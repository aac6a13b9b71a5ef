"""Bytes that a storage holds on a simulated card, for as long as it lives.

Note [Who owns the bytes]
The allocator's block hangs on the *storage's* Python object (``_gpumem``). PyTorch
keeps that object alive exactly as long as the C++ storage, whoever holds it: views,
tensors saved for backward, ``untyped_storage()``. When it goes, so does the block.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

import torch

from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.machine import OutOfMemory
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.errors import HostMemoryError

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.devices.simulated.machine import SimulatedCard


class Memory:
    """The bytes that one storage holds on a card; given back when it goes.

    Attributes:
        card: The card that holds the bytes.
        nbytes: Bytes asked for; 0 holds no block.
    """

    __slots__ = ("block", "card", "nbytes")

    def __init__(self, card: SimulatedCard, nbytes: int) -> None:
        __tracebackhide__ = True
        self.card = card
        self.nbytes = nbytes
        self.block: Block | None = None
        if not card.machine.is_initialized:
            # C++ asks for this once in a process only, whatever is installed later.
            card.machine.is_initialized = True
            torch.cuda.init()
        if nbytes:
            if type(nbytes) is not int:
                refuse("a tensor of symbolic size")
            self.block = allocate(card, nbytes)

    def __del__(self) -> None:
        if self.block is not None:
            self.card.release(self.block)


def allocate(card: SimulatedCard, nbytes: int) -> Block:
    """Take a block on the calling thread's current stream.

    Raises:
        torch.OutOfMemoryError: There is no room. The error carries no cause and no
            context of the model's, as the real allocator's does not.
    """
    __tracebackhide__ = True
    stream = card.machine.streams.current(card.index)
    try:
        return card.allocate(nbytes, stream)
    except OutOfMemory as error:
        failure = error.with_traceback(None)  # its frames would hold themselves
    raise _torchs_error(card, failure)


def allocate_aside(card: SimulatedCard, nbytes: int, stream: int) -> Block:
    """Take a block on a stream for a library, which faults do not count.

    Raises:
        torch.OutOfMemoryError: There is no room.
    """
    __tracebackhide__ = True
    try:
        return card.allocate(nbytes, stream, is_internal=True)
    except OutOfMemory as error:
        failure = error.with_traceback(None)  # its frames would hold themselves
    raise _torchs_error(card, failure)


def hold_workspace(card: SimulatedCard) -> None:
    """Take the workspace of the thread's cuBLAS handle on its stream, if it has none.

    A handle belongs to a host thread, and on a real card backward runs in one of its
    own.

    Raises:
        torch.OutOfMemoryError: There is no room for it.
    """
    __tracebackhide__ = True
    stream = card.machine.streams.current(card.index)
    handle = "autograd" if in_backward() else threading.get_ident()
    if (handle, stream) in card.workspaces:
        return
    try:
        card.hold_workspace(handle, stream)
    except OutOfMemory as error:
        failure = error.with_traceback(None)  # its frames would hold themselves
    else:
        return
    raise _torchs_error(card, failure)


def _torchs_error(card: SimulatedCard, failure: OutOfMemory) -> torch.OutOfMemoryError:
    """Tell who listens of an OOM, and return the error that torch raises for it."""
    card.machine.tell_oom(card.index, failure)
    return torch.OutOfMemoryError(str(failure))


def lacks_host_memory(error: RuntimeError) -> bool:
    """Tell whether it was the host that had no room, and nobody pretends so.

    Source: ``c10/core/impl/alloc_cpu.cpp``.
    """
    return "DefaultCPUAllocator" in str(error) and not hasattr(
        error, "_gpumem_injected"
    )


class HostRoom:
    """A block that computes or keeps a card's values; the host's error gets a name.

    Raises:
        HostMemoryError: The host has no room for them.
    """

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, _kind: object, error: BaseException | None, _frames: object
    ) -> None:
        """Name the host where it was the host's."""
        if isinstance(error, RuntimeError) and lacks_host_memory(error):
            raise HostMemoryError from None


HOST_ROOM: Final = HostRoom()


def memory_of(storage: torch.UntypedStorage) -> Memory | None:
    """Return what a storage holds on a card; None for one on the host."""
    memory: Memory | None = getattr(storage, "_gpumem", None)
    return memory


def charge(storage: torch.UntypedStorage, card: SimulatedCard) -> Memory:
    """Make sure that a storage's bytes are held on ``card``; return the holding.

    A storage that has grown gets a new block before the old one goes, as
    ``resize_`` does on a real card.

    Raises:
        torch.OutOfMemoryError: There is no room; the old holding stays.
    """
    memory = memory_of(storage)
    nbytes = storage.nbytes()
    if memory is None or memory.nbytes < nbytes:
        memory = Memory(card, nbytes)
        storage._gpumem = memory  # type: ignore[attr-defined]  # see Note [Who owns the bytes]
    return memory


def hold(storage: torch.UntypedStorage, memory: Memory) -> None:
    """Hang a holding that was taken beforehand on the storage made for it."""
    storage._gpumem = memory  # type: ignore[attr-defined]  # see Note [Who owns the bytes]
