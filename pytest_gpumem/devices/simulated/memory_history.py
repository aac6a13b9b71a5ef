"""Records the memory history for ``torch.cuda.memory._record_memory_history``.

The model reports every change. This module converts changes to the entries of
``device_traces``, which PyTorch's memory_viz page draws, with the Python frames that made
the request. Source: ``torch/cuda/memory.py`` (``_snapshot``: keys) and
``torch/csrc/cuda/Module.cpp``.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.allocator.pools import DEFAULT
from pytest_gpumem.stacks import calling_frame, frames_from

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.allocator.blocks import Block, Segment
    from pytest_gpumem.allocator.pools import PoolId

#: Frames of files in this folder belong to the simulation and are left out.
_OWN: Final = str(Path(__file__).resolve().parents[2])
#: The actions that ``skip_actions`` accepts.
#: Source: the docstring of ``_record_memory_history``.
ACTIONS: Final = (
    "alloc",
    "free_requested",
    "free_completed",
    "segment_alloc",
    "segment_free",
    "oom",
    "snapshot",
)
#: The actions of a request for memory.
_OF_REQUESTS: Final = frozenset({"alloc", "segment_alloc", "segment_map", "oom"})


class MemoryHistory:
    """The changes of each card since recording began.

    Args:
        num_cards: Number of cards.
        keeps_entries: Whether changes are recorded, or only the frames of live blocks.
        context: The frames that are recorded: ``None`` (none), ``"state"`` (of live
            blocks and segments), ``"alloc"`` (also in entries; those of a release are of
            its request) or ``"all"`` (a release has its own).
        max_entries: The number of newest entries kept for each card.
        skip_actions: Actions that are not recorded.
    """

    def __init__(
        self,
        num_cards: int,
        *,
        keeps_entries: bool = True,
        context: str | None = "all",
        max_entries: int = sys.maxsize,
        skip_actions: Sequence[str] = (),
    ) -> None:
        self._context = context
        self._keeps_entries = keeps_entries
        self._skipped = frozenset(skip_actions)
        self.entries: Final = [
            deque[dict[str, Any]](maxlen=max_entries) for _ in range(num_cards)
        ]

    def note(  # noqa: PLR0917  # one argument for each part of an entry
        self,
        card: int,
        action: str,
        address: int,
        size: int,
        stream: int,
        pool_id: PoolId = DEFAULT,
        owner: Block | Segment | None = None,
        *,
        is_serving: bool = False,
    ) -> None:
        """Record one change; for ``oom``, ``address`` is the card's free bytes.

        Source of whose frames an entry has: ``CUDACachingAllocator.cpp``, the levels of
        ``maybeGatherContext``, ``record_trace``, ``context_when_allocated`` and
        ``context_when_segment_allocated``.

        Args:
            card: The card's index.
            action: The change.
            address: Address of the block or segment.
            size: Its bytes; for ``snapshot``, the active bytes.
            stream: Handle of its stream.
            pool_id: Its pool.
            owner: The block or segment; a request leaves its frames there.
            is_serving: Whether the change is made for a request.
        """
        frames = None
        if action != "snapshot":
            is_requested = is_serving or action in _OF_REQUESTS
            if self._context == "all" or (is_requested and self._context is not None):
                frames = python_frames()
        if owner is not None:
            if action in _OF_REQUESTS and (
                action != "segment_map" or owner.frames is None
            ):
                owner.frames = frames
            elif frames is None:
                frames = owner.frames
        if not self._keeps_entries or action in self._skipped:
            return
        self.entries[card].append(
            {
                "action": action,
                "device_free" if action == "oom" else "addr": address,
                "size": size,
                "stream": stream,
                "time_us": time.time_ns() // 1000,
                "frames": frames
                if frames and self._context in {"alloc", "all"}
                else [],
                "compile_context": "N/A",
                "user_metadata": "",
                "pool_id": pool_id,
            }
        )


def python_frames() -> list[dict[str, Any]]:
    """Return the thread's Python frames, innermost first, without the simulation's."""
    return [
        {"filename": code.co_filename, "line": frame.f_lineno, "name": code.co_name}
        for frame in frames_from(calling_frame())
        if not (code := frame.f_code).co_filename.startswith(_OWN)
    ]
