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


class MemoryHistory:
    """The changes of each card since recording began.

    Args:
        num_cards: Number of cards.
        keeps_entries: Whether changes are recorded, or only the frames of live blocks.
        context: The frames that are recorded: ``None`` (none), ``"state"`` (of live
            blocks), ``"alloc"`` (also of requests) or ``"all"`` (also of releases).
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

    def note(  # noqa: PLR0917  # the parts of an entry
        self,
        card: int,
        action: str,
        address: int,
        size: int,
        stream: int,
        pool_id: PoolId = DEFAULT,
    ) -> None:
        """Record one change; for ``oom``, ``address`` is the card's free bytes."""
        if not self._keeps_entries or action in self._skipped:
            return
        wanted = "all" if action.startswith("free") else "alloc"
        has_frames = self._context in {"all", wanted}
        self.entries[card].append(
            {
                "action": action,
                "device_free" if action == "oom" else "addr": address,
                "size": size,
                "stream": stream,
                "time_us": time.time_ns() // 1000,
                "frames": python_frames() if has_frames else [],
                "compile_context": "N/A",
                "user_metadata": "",
                "pool_id": pool_id,
            }
        )

    def frames(self) -> list[dict[str, Any]] | None:
        """Return the frames for a new block, or None if frames are not recorded."""
        return python_frames() if self._context is not None else None


def python_frames() -> list[dict[str, Any]]:
    """Return the thread's Python frames, innermost first, without the simulation's."""
    return [
        {"filename": code.co_filename, "line": frame.f_lineno, "name": code.co_name}
        for frame in frames_from(calling_frame())
        if not (code := frame.f_code).co_filename.startswith(_OWN)
    ]
