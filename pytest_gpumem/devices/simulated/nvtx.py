"""NVTX ranges on simulated cards: they are counted, but no profiler sees them.

Source of the calls and their results: ``torch/cuda/nvtx.py``.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any


class Nvtx:
    """Replaces ``torch._C._nvtx``."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._handles = itertools.count(1)

    def rangePushA(self, _message: str) -> int:  # noqa: N802  # torch's name
        """Open a range; return its depth, from 0."""
        depth: int = getattr(self._local, "depth", 0)
        self._local.depth = depth + 1
        return depth

    def rangePop(self) -> int:  # noqa: N802  # torch's name
        """Close the innermost range; return its depth."""
        depth = max(getattr(self._local, "depth", 0) - 1, 0)
        self._local.depth = depth
        return depth

    def rangeStartA(self, _message: str) -> int:  # noqa: N802  # torch's name
        """Open a range that may end in another thread; return its handle."""
        return next(self._handles)

    def rangeEnd(self, _handle: int) -> None:  # noqa: N802  # torch's name
        """Close a range by its handle."""

    def markA(self, _message: str) -> None:  # noqa: N802  # torch's name
        """Do nothing; in NVTX, mark a point in time."""

    def deviceRangeStart(self, _message: str, _stream: int) -> Any:  # noqa: N802  # torch's name
        """Open a range on a stream; return the handle for ``deviceRangeEnd``."""
        return next(self._handles)

    def deviceRangeEnd(self, _handle: Any, _stream: int) -> None:  # noqa: N802  # torch's name
        """Close a range on a stream."""
