"""The bytes that a storage holds on a simulated card while the storage exists.

Note [Who owns the bytes]
The *storage's* Python object owns the allocator's block (attribute ``_gpumem``). PyTorch
keeps this object alive exactly as long as the C++ storage, whether views, tensors saved
for backward or ``untyped_storage()`` refer to it. When the object is deleted, the block
is freed.

Up to torch 2.9 C++ has no reference to the object that it keeps alive. If only a reference
cycle refers to the object (``torch.save`` leaves such cycles), Python's garbage collector
would delete its attributes, although tensors still use the storage. So the collector is not
shown the object there.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.cublas_handles import AUTOGRAD
from pytest_gpumem.devices.simulated.machine import OutOfMemory
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.torch_build import REFERENCES_BY_CPP
from pytest_gpumem.errors import HostMemoryError
from pytest_gpumem.kernels.cublas import OF_LT

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.sent_storages import Sent


#: From this many bytes on, freeing values takes noticeable time.
_LARGE: Final = 2**20


class Memory:
    """The bytes that one storage holds on a card; freed when this object is deleted.

    Attributes:
        card: The card that holds the bytes.
        nbytes: Requested bytes; with 0 there is no block.
        sent: Whether other processes have the storage, see
            Note [Memory that processes share].
    """

    __slots__ = ("block", "card", "nbytes", "sent")

    #: Whether another process has sent the storage.
    is_received: ClassVar[bool] = False

    def __init__(self, card: SimulatedCard, nbytes: int) -> None:
        self.card = card
        self.nbytes = nbytes
        self.block: Block | None = None
        self.sent: Sent | None = None
        if not card.machine.is_initialized:
            # C++ initialises CUDA only once in a process, for all installations. In a forked
            # child, it fails each time.
            torch.cuda.init()
            card.machine.is_initialized = True
        if type(nbytes) is not int:
            is_traced = isinstance(nbytes, torch.Tensor)
            refuse(
                "a copy between devices in torch.jit.trace"
                if is_traced
                else "a tensor of symbolic size"
            )
        if nbytes:
            self.block = allocate(card, nbytes)

    def __del__(self) -> None:
        if self.block is None:
            return
        if self.sent is None:
            if not REFERENCES_BY_CPP and self.nbytes >= _LARGE:
                self.card.machine.note_leaving(self.nbytes)
            self.card.release(self.block)
        else:
            self.card.machine.exchange.give_up(self.card, self.block, self.sent)


def allocate(card: SimulatedCard, nbytes: int) -> Block:
    """Take a block on the calling thread's current stream.

    Raises:
        torch.OutOfMemoryError: The card has no room. As with the real allocator, the
            error has no cause and no context from the model.
    """
    stream = card.machine.streams.current(card.index)
    try:
        return card.allocate(nbytes, stream)
    except OutOfMemory as error:
        # Avoids a reference cycle through its frames.
        failure = error.with_traceback(None)
    raise _torchs_error(card, failure)


def allocate_aside(card: SimulatedCard, nbytes: int, stream: int) -> Block:
    """Allocate a block on a stream for a library; faults do not count it.

    Raises:
        torch.OutOfMemoryError: There is no room.
    """
    try:
        return card.allocate(nbytes, stream, is_internal=True)
    except OutOfMemory as error:
        # Avoids a reference cycle through its frames.
        failure = error.with_traceback(None)
    raise _torchs_error(card, failure)


def hold_workspace(card: SimulatedCard, *, of_lt: bool = False) -> None:
    """Take the workspace of the thread's cuBLAS handle on its stream, if there is none.

    Each host thread has its own handle. On a real card, backward runs in its own
    thread. If workspaces are not kept, the workspace is allocated and freed at once.

    Args:
        card: The card.
        of_lt: Whether cuBLASLt computes the product; it shares kept workspaces.

    Raises:
        torch.OutOfMemoryError: There is no room for it.
    """
    stream = card.machine.streams.current(card.index)
    if not card.keeps_workspaces:
        nbytes = OF_LT if of_lt else card.workspace_bytes
        if nbytes:
            card.release(allocate_aside(card, nbytes, stream))
        return
    handle = AUTOGRAD if in_backward() else card.cublas_handles.of_thread()
    if (handle, stream) in card.workspaces:
        return
    try:
        card.hold_workspace(handle, stream)
    except OutOfMemory as error:
        # Avoids a reference cycle through its frames.
        failure = error.with_traceback(None)
    else:
        return
    raise _torchs_error(card, failure)


def _torchs_error(card: SimulatedCard, failure: OutOfMemory) -> torch.OutOfMemoryError:
    """Call the observers of an OOM, and return the error that torch raises for it."""
    card.machine.tell_oom(card.index, failure)
    return torch.OutOfMemoryError(str(failure))


def lacks_host_memory(error: RuntimeError) -> bool:
    """Return whether an error means that the host, not a card, is out of memory.

    Source: ``c10/core/impl/alloc_cpu.cpp``.
    """
    return "DefaultCPUAllocator" in str(error) and not hasattr(
        error, "_gpumem_injected"
    )


class HostRoom:
    """A context manager for host memory of a card's values; renames the host's error.

    Raises:
        HostMemoryError: The host has no room for the values.
    """

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, _kind: object, error: BaseException | None, _frames: object
    ) -> None:
        """Raise ``HostMemoryError`` if the host is out of memory."""
        if isinstance(error, RuntimeError) and lacks_host_memory(error):
            raise HostMemoryError from None


HOST_ROOM: Final = HostRoom()


def memory_of(storage: torch.UntypedStorage) -> Memory | None:
    """Return a storage's memory on a card; None for a storage on the host."""
    memory: Memory | None = getattr(storage, "_gpumem", None)
    return memory


def check_resizable(storage: torch.UntypedStorage) -> None:
    """Raise an error if a storage of a card must keep its size.

    C++ ends the process if a storage in shared memory is resized.

    Raises:
        UnsupportedOnSimulatedDeviceError: The storage was sent to another process.
        RuntimeError: The storage was received from another process (torch's message).
    """
    memory = memory_of(storage)
    if memory is not None and memory.sent is not None:
        refuse("resizing a tensor that was sent to another process")
    is_received = memory is not None and memory.is_received
    if is_received or not storage.resizable():
        raise RuntimeError("Trying to resize storage that is not resizable")


def charge(storage: torch.UntypedStorage, card: SimulatedCard) -> Memory:
    """Make sure that a storage's bytes are held on ``card``, and return its memory.

    A storage that has grown gets a new block before its old block is freed, as in
    ``resize_`` on a real card.

    Raises:
        torch.OutOfMemoryError: The card has no room; the old memory is kept.
    """
    memory = memory_of(storage)
    nbytes = storage.nbytes()
    if memory is None or memory.nbytes < nbytes:
        memory = Memory(card, nbytes)
        hold(storage, memory)
    return memory


#: Source: CPython's C API, "Supporting Cyclic Garbage Collection".
_hide_from_collector: Final[Any] = ctypes.pythonapi.PyObject_GC_UnTrack
_hide_from_collector.argtypes = [ctypes.py_object]
_hide_from_collector.restype = None


def hold(storage: torch.UntypedStorage, memory: Memory) -> None:
    """Attach memory to the storage that it was taken for."""
    if not REFERENCES_BY_CPP:
        _hide_from_collector(storage)
    storage._gpumem = memory  # type: ignore[attr-defined]  # see Note [Who owns the bytes]
