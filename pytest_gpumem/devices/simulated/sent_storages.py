"""Counts which processes still use the storages that a simulated machine has sent.

See Note [Memory that processes share].
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.devices.simulated.card import SimulatedCard

_Storage: Final[Any] = torch.UntypedStorage
_address: Final[Any] = torch.UntypedStorage.data_ptr

#: Counters in one file. Source: ``CUDA_IPC_REF_COUNTER_FILE_SIZE``.
_COUNTERS: Final = 10_000
_COUNTER_BYTES: Final = 8
#: Source: ``warnProducerTerminatedBeforeSharedTensorsReleased``.
_ENDED: Final = (
    "Producer process has been terminated before all shared CUDA tensors released. See "
    "Note [Sharing CUDA tensors]"
)


def shared_name(storage: torch.UntypedStorage) -> bytes:
    """Move a storage to shared memory, if it is not there, and return its name."""
    with _without_heirs():
        manager, name, _nbytes = storage._share_filename_cpu_()
    return bytes(manager) + b"\n" + bytes(name)


#: Ids of the processes, forked ones included, whose C++ code has started the manager of
#: shared memory.
_managed: Final[set[int]] = set()


#: The open files of this process, by their numbers; Windows has none and needs no manager.
_OPEN_FILES: Final = Path("/dev/fd")


@contextmanager
def _without_heirs() -> Iterator[None]:
    """Let the manager that C++ starts at the first use inherit no open files.

    The manager runs longer than this process. If it had inherited a pipe of
    ``multiprocessing``, ``Process.join(timeout)`` of the parent would wait for the
    manager.
    """
    if os.getpid() in _managed or not _OPEN_FILES.is_dir():
        yield
        return
    found = [int(each.name) for each in _OPEN_FILES.iterdir()]
    kept = [each for each in found if each > 2 and _is_inheritable(each)]  # noqa: PLR2004  # not the standard streams
    for each in kept:
        os.set_inheritable(each, False)
    try:
        yield
    finally:
        for each in kept:
            os.set_inheritable(each, True)
    _managed.add(os.getpid())


def _is_inheritable(file: int) -> bool:
    try:
        return os.get_inheritable(file)
    except OSError:  # the directory's own file, which is closed by now
        return False


def opened(name: bytes, nbytes: int) -> torch.UntypedStorage:
    """Return a view of shared memory, by its name.

    Raises:
        RuntimeError: There is no shared memory of that name.
    """
    manager, _, own = name.partition(b"\n")
    found: torch.UntypedStorage = _Storage._new_shared_filename_cpu(
        manager, own, nbytes
    )
    return found


class Counter:
    """A number in shared memory: 1 until the receiver has deleted its storage.

    Args:
        file: The shared memory, which exists as long as this object.
        index: The index of the number in the memory.
    """

    __slots__ = ("_cell", "_file")

    def __init__(self, file: torch.UntypedStorage, index: int) -> None:
        self._file = file
        address = _address(file) + _COUNTER_BYTES * index
        self._cell = ctypes.c_int64.from_address(address)

    @property
    def is_held(self) -> bool:
        """Whether the receiver still has the storage, or has not yet received it."""
        return self._cell.value > 0

    def set(self) -> None:
        """Count a receiver."""
        self._cell.value = 1

    def drop(self) -> None:
        """Count one receiver less."""
        self._cell.value -= 1


@dataclass
class Sent:
    """The facts about a storage that was sent to other processes.

    Attributes:
        name: The name of the shared memory of the values; empty if no values are kept.
        file: A second view of that memory, which keeps it until the block is free.
        counters: One for each time that the storage was sent.
    """

    name: bytes = b""
    file: torch.UntypedStorage | None = None
    counters: list[Counter] = field(default_factory=list)

    @property
    def is_held(self) -> bool:
        """Whether a receiver still has the storage."""
        return any(each.is_held for each in self.counters)


class Exchange:
    """What one machine has sent to other processes and received from them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: deque[tuple[SimulatedCard, Block, Sent]] = deque()
        #: Files of counters of this process, and the next free index in the last file.
        self._own: list[torch.UntypedStorage] = []
        self._next = 0
        #: Files of counters of other processes, by their names.
        self._files: dict[bytes, torch.UntypedStorage] = {}

    def new_counter(self) -> tuple[Counter, bytes, int]:
        """Return a new counter with the name of its file and its index there."""
        with self._lock:
            if not self._own:
                atexit.register(self._warn, os.getpid())
            if not self._own or self._next == _COUNTERS:
                nbytes = _COUNTER_BYTES * _COUNTERS
                with _without_heirs():
                    self._own.append(_Storage._new_using_filename_cpu(nbytes))
                self._next = 0
            file, index = self._own[-1], self._next
            self._next += 1
            counter = Counter(file, index)
            counter.set()
            return counter, shared_name(file), index

    def counter(self, name: bytes, index: int) -> Counter:
        """Return a counter of another process.

        Raises:
            RuntimeError: That process has ended.
        """
        with self._lock:
            if name not in self._files:
                self._files[name] = opened(name, _COUNTER_BYTES * _COUNTERS)
            return Counter(self._files[name], index)

    def give_up(self, card: SimulatedCard, block: Block, sent: Sent) -> None:
        """Free the block of a deleted storage as soon as no receiver has it."""
        self._kept.append((card, block, sent))
        self.collect()

    def collect(self) -> bool:
        """Free the blocks that no receiver has any more; return whether there were any.

        Finalisers call this, also while it runs.
        """
        has_freed = False
        for _ in range(len(self._kept)):
            try:
                kept = self._kept.popleft()
            except IndexError:  # another thread has taken it
                break
            card, block, sent = kept
            if sent.is_held:
                self._kept.append(kept)
            else:
                card.release(block)
                has_freed = True
        return has_freed

    def _warn(self, pid: int) -> None:
        held = (
            Counter(file, n).is_held for file in self._own for n in range(_COUNTERS)
        )
        if os.getpid() == pid and any(held):
            sys.stderr.write(f"[W CudaIPCTypes.cpp:16] {_ENDED}\n")
