"""Peaks and counts of real cards, from torch's one set of statistics for each.

Note [Who resets torch's statistics]
Every tracker of a card, and user code, read and reset the same statistics. Before a
reset of peaks, whoever's it is, every open tracker takes the peaks in; before a reset of
running totals the counts so far are kept. So nobody's reset hides anything from others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.model.records import MemoryFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_gpumem.devices.nvml import Reading

_PEAKS: Final = ("allocated", "reserved", "requested", "active")
#: Requests served, requests that failed, and flushes of the cache for one.
_COUNTS: Final = ("allocation.all.allocated", "num_ooms", "num_alloc_retries")


class CudaStatistics:
    """What torch counts of each card; see Note [Who resets torch's statistics]."""

    def __init__(self) -> None:
        self._trackers: list[CudaTracker] = []
        self._patches = PatchSet()
        #: What ``counts`` would have lost to resets by user code.
        self._past_counts: dict[int, list[int]] = {}

    def of(self, index: int) -> Mapping[str, int]:
        """Return ``torch.cuda.memory_stats``; empty before CUDA is used."""
        return torch.cuda.memory_stats(index) if torch.cuda.is_initialized() else {}

    def counts(self, index: int) -> list[int]:
        """Return how many requests were served, failed, and made the cache be flushed.

        A reset of these statistics by user code, while a tracker is open, loses none.
        """
        stats = self.of(index)
        past = self._past_counts.get(index, [0] * len(_COUNTS))
        return [
            before + stats.get(name, 0)
            for name, before in zip(_COUNTS, past, strict=True)
        ]

    def fold(self, index: int) -> None:
        """Let every open tracker take the peaks in, then reset them."""
        self._take(index)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats(index)

    def _take(self, index: int) -> None:
        stats = self.of(index)
        for tracker in self._trackers:
            tracker.take(index, stats)

    def _keep_counts(self, index: int) -> None:
        self._past_counts[index] = self.counts(index)

    def add(self, tracker: CudaTracker) -> None:
        """Note an open tracker; user code's own resets are folded from now on."""
        if not self._trackers:
            self._fold_before("_cuda_resetPeakMemoryStats", self._take)
            self._fold_before("_accelerator_resetPeakStats", self._take)
            self._fold_before("_cuda_resetAccumulatedMemoryStats", self._keep_counts)
            self._fold_before("_accelerator_resetAccumulatedStats", self._keep_counts)
        self._trackers.append(tracker)

    def drop(self, tracker: CudaTracker) -> None:
        """Forget a tracker; with the last one, resets are torch's own again."""
        if tracker in self._trackers:
            self._trackers.remove(tracker)
            if not self._trackers:
                self._patches.restore()

    def _fold_before(self, name: str, fold: Callable[[int], None]) -> None:
        original: Any = getattr(torch._C, name, None)  # noqa: SLF001  # below torch.cuda

        def reset(index: int) -> None:
            fold(index)
            original(index)

        if original is not None:
            self._patches.set(torch._C, name, reset)  # noqa: SLF001  # likewise


class CudaTracker:
    """Peaks of one real card, by resetting torch's own peak statistics.

    Args:
        statistics: The statistics, shared by all trackers.
        index: The card.
        counted: What NVML counts on a card.
    """

    def __init__(
        self,
        statistics: CudaStatistics,
        index: int,
        counted: Callable[[int], Reading],
    ) -> None:
        self._statistics = statistics
        self._index = index
        self._counted = counted
        statistics.fold(index)
        stats = statistics.of(index)
        self._start = stats
        self._start_counts = statistics.counts(index)
        self._peaks = {
            name: stats.get(f"{name}_bytes.all.current", 0) for name in _PEAKS
        }
        statistics.add(self)

    def take(self, index: int, stats: Mapping[str, int]) -> None:
        """Take in the peaks since the last reset."""
        if index == self._index:
            for name in _PEAKS:
                peak = stats.get(f"{name}_bytes.all.peak", 0)
                self._peaks[name] = max(self._peaks[name], peak)

    def read(self) -> MemoryFigures:
        """Return the figures up to now."""
        stats = self._statistics.of(self._index)
        self.take(self._index, stats)
        reserved = stats.get("reserved_bytes.all.current", 0)
        counts = self._statistics.counts(self._index)
        _served, ooms, retries = (
            now - before for now, before in zip(counts, self._start_counts, strict=True)
        )
        process = self._counted(self._index).process_bytes
        beside = None if process is None else max(process - reserved, 0)
        return MemoryFigures(
            device_index=self._index,
            peak_allocated_bytes=self._peaks["allocated"],
            peak_reserved_bytes=self._peaks["reserved"],
            peak_requested_bytes=self._peaks["requested"],
            peak_active_bytes=self._peaks["active"],
            start_allocated_bytes=self._start.get("allocated_bytes.all.current", 0),
            end_allocated_bytes=stats.get("allocated_bytes.all.current", 0),
            end_reserved_bytes=reserved,
            num_ooms=ooms,
            num_alloc_retries=retries,
            context_bytes=beside or 0,
            # The allocator's peak is exact; what is beside it comes and seldom goes.
            peak_process_bytes=None
            if beside is None
            else self._peaks["reserved"] + beside,
            end_requested_bytes=stats.get("requested_bytes.all.current", 0),
            end_active_bytes=stats.get("active_bytes.all.current", 0),
        )

    def peek(self) -> MemoryFigures:
        """Return the figures up to now."""
        return self.read()

    def close(self) -> MemoryFigures:
        """Return the final figures and stop tracking."""
        figures = self.read()
        self._statistics.drop(self)
        return figures
