"""The changes that a real allocator made during a block of code, read afterwards.

A real allocator calls no Python code when it serves a request. But it can record its own
history with the Python stack of each change:
``torch.cuda.memory._record_memory_history``.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.allocator.blocks import MIN_BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

_keep: Final[Any] = torch.cuda.memory._record_memory_history  # noqa: SLF001  # no public API
#: The number of newest changes that are kept for each card.
ENTRIES: Final = 50_000
#: The actions that change reserved bytes, and the sign of the change.
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
        address: Address of the block; 0 if only reserved bytes change.
        nbytes: Allocated bytes; negative if they were freed.
        reserved_bytes: Reserved bytes; negative if they were returned to the driver.
        time_us: Time of the change, in microseconds since the epoch.
        frames: The Python stack, innermost frame first; each frame has ``filename``,
            ``line`` and ``name``.
    """

    address: int
    nbytes: int
    reserved_bytes: int
    time_us: int
    frames: list[dict[str, Any]]


class CudaHistory:
    """The changes of every card during a block; see ``history_of_block``."""

    def __init__(self) -> None:
        self._start_us = 0
        self._is_open = True
        self._is_ours = False

    def begin(self) -> None:
        """Start recording, after CUDA is initialised."""
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
        """Stop recording, and restore torch's own recording to its previous state."""
        self._is_open = False
        if self._is_ours and is_kept():
            _keep(enabled=None)

    def read(self) -> list[list[MemoryChange]] | None:
        """Return the changes so far, in one list per card.

        The result is None if there is no history, because CUDA was not used, or because the
        program under test has stopped the recording.
        """
        if not (self._is_open and is_kept()):
            return None
        snapshot: Any = torch.cuda.memory._snapshot()  # noqa: SLF001  # no public API
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
    """Return whether torch records a history now."""
    if not torch.cuda.is_initialized():
        return False
    enabled: Any = getattr(torch._C, "_cuda_isHistoryEnabled", None)  # noqa: SLF001  # missing in older versions
    return enabled is not None and bool(enabled())


@contextmanager
def history_of_block() -> Iterator[CudaHistory]:
    """Make torch record the memory history inside a ``with`` block.

    If a history is already recorded, by ``history_kept`` or by the program, it is used.

    Limits: only the newest ``ENTRIES`` changes of a card are kept. Sizes are rounded
    requests; the additional bytes of a larger block that the allocator does not split are
    not counted. The program can see that a history is recorded.
    """
    history = CudaHistory()
    torch.cuda._lazy_call(history.begin)  # noqa: SLF001  # now, or when CUDA is initialised
    try:
        yield history
    finally:
        history.close()
