"""What a real allocator did over a block of code, read afterwards.

A real allocator calls no Python code when it serves a request, but it can keep its own
history, with the Python stack of each change: ``torch.cuda.memory._record_memory_history``.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.allocator.blocks import MIN_BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

_keep: Final[Any] = torch.cuda.memory._record_memory_history  # noqa: SLF001  # torch's only way
#: Changes that are kept of each card, the newest.
ENTRIES: Final = 50_000
#: What changes reserved bytes, and in which direction.
#: Source: ``TraceEntry::Action`` of ``c10/cuda/CUDACachingAllocator.h``.
_SEGMENTS: Final = {
    "segment_alloc": 1,
    "segment_map": 1,
    "segment_free": -1,
    "segment_unmap": -1,
}


class MemoryChange(NamedTuple):
    """One change of a card's memory.

    Attributes:
        address: Of the block; 0 where only reserved bytes change.
        nbytes: Bytes that were allocated; negative if they were given back.
        reserved_bytes: Bytes that were reserved; negative likewise.
        time_us: When, in microseconds since the epoch.
        frames: The Python stack, from the inside out; each has ``filename``, ``line``
            and ``name``.
    """

    address: int
    nbytes: int
    reserved_bytes: int
    time_us: int
    frames: list[dict[str, Any]]


class CudaHistory:
    """The changes of every card over a block; see ``history_of_block``."""

    def __init__(self) -> None:
        self._start_us = 0
        self._is_open = True
        self._is_ours = False

    def begin(self) -> None:
        """Begin, once CUDA is in use."""
        if not self._is_open:
            return
        self._start_us = time.time_ns() // 1000
        if not is_kept():
            self._is_ours = True
            _keep(
                context="alloc",
                stacks="python",
                max_entries=ENTRIES,
                clear_history=True,
            )

    def close(self) -> None:
        """End it, and put torch's own recording back as it was."""
        self._is_open = False
        if self._is_ours and is_kept():
            _keep(enabled=None)

    def read(self) -> list[list[MemoryChange]] | None:
        """Return the changes so far, card by card.

        None if there is nothing to tell: CUDA was not used, or the program under test
        has ended the recording.
        """
        if not (self._is_open and is_kept()):
            return None
        snapshot: Any = torch.cuda.memory._snapshot()  # noqa: SLF001  # torch's only way
        return [
            [
                change
                for entry in entries
                if entry["time_us"] >= self._start_us
                if (change := _change(entry)) is not None
            ]
            for entries in snapshot["device_traces"]
        ]


def _change(entry: dict[str, Any]) -> MemoryChange | None:
    action, size = entry["action"], entry["size"]
    when, frames = entry["time_us"], entry.get("frames", [])
    if action in _SEGMENTS:
        return MemoryChange(0, 0, _SEGMENTS[action] * size, when, frames)
    if action not in ("alloc", "free_requested"):
        return None
    rounded = -(-size // MIN_BLOCK_SIZE) * MIN_BLOCK_SIZE
    nbytes = rounded if action == "alloc" else -rounded
    return MemoryChange(entry["addr"], nbytes, 0, when, frames)


def is_kept() -> bool:
    """Tell whether torch keeps a history at present."""
    if not torch.cuda.is_initialized():
        return False
    enabled: Any = getattr(torch._C, "_cuda_isHistoryEnabled", None)  # noqa: SLF001  # older versions lack it
    return enabled is not None and bool(enabled())


@contextmanager
def history_of_block() -> Iterator[CudaHistory]:
    """Have torch keep the history of memory over a block.

    Where one is kept already, by ``history_kept`` or by the program, that one is read.

    Limits: of more than ``ENTRIES`` changes of a card the newest are kept. Sizes are those
    of requests, rounded up: what the allocator does not split off a larger block is not
    counted. The program can see that a history is kept.
    """
    history = CudaHistory()
    torch.cuda._lazy_call(history.begin)  # noqa: SLF001  # now, or once CUDA is in use
    try:
        yield history
    finally:
        history.close()
