"""Peaks and counts of real cards, from torch's single set of statistics per card.

Note [Who resets torch's statistics]
All trackers of a card and user code read and reset the same statistics. Before any reset
of peaks, every open tracker stores the present peaks. Before a reset of running totals,
the present counts are stored. A reset therefore hides nothing from other readers.

Note [Peaks of user code]
A tracker must reset the peaks, because an earlier, higher peak would hide its own. The
peaks that user code would have read are stored. User code reads the higher of the stored
and the present peak, until it resets the peaks itself. If no peaks are stored and no
tracker is open, torch's functions are not replaced. Limits: C++ code that queries the
allocator reads the present peaks.
Source: ``c10/cuda/CUDACachingAllocator.cpp``, ``resetPeakStats``: it sets the peak of every
statistic of every pool to the current value.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.records.memory_figures import MemoryFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_gpumem.devices.nvml import Reading

_PEAKS: Final = ("allocated", "reserved", "requested", "active")
#: The statistics of served requests, failed requests, and cache flushes for a request.
_COUNTS: Final = ("allocation.all.allocated", "num_ooms", "num_alloc_retries")


class CudaStatistics:
    """Torch's statistics of each card; see Note [Who resets torch's statistics]."""

    def __init__(self) -> None:
        self._trackers: list[CudaTracker] = []
        self._patches = PatchSet()
        #: Counts from before resets by user code, by card.
        self._past_counts: dict[int, list[int]] = {}
        #: Stored peaks for user code, where they exceed the card's own; by card, statistic
        #: and pool.
        self._kept_peaks: dict[int, dict[tuple[str, str], int]] = {}
        self._is_patched = False
        self._reads_own = threading.local()
        self._read: Any = None
        self._reset: Any = None

    def of(self, index: int) -> Mapping[str, int]:
        """Return the card's ``memory_stats`` without stored peaks; empty before CUDA."""
        if not torch.cuda.is_initialized():
            return {}
        self._reads_own.value = True
        try:
            return torch.cuda.memory_stats(index)
        finally:
            self._reads_own.value = False

    def counts(self, index: int) -> list[int]:
        """Return the numbers of served requests, failed requests and cache flushes.

        A reset by user code while a tracker is open does not change these numbers.
        """
        stats = self.of(index)
        past = self._past_counts.get(index, [0] * len(_COUNTS))
        return [
            before + stats.get(name, 0)
            for name, before in zip(_COUNTS, past, strict=True)
        ]

    def fold(self, index: int) -> None:
        """Store the peaks in every open tracker and for user code, then reset them."""
        if not torch.cuda.is_initialized():
            return
        self._patch()
        self._take(index)
        kept = self._kept_peaks.pop(index, {})
        for name, values in _with_peaks(self._read(index)):
            peak = max(values["peak"], kept.get(name, 0))
            if peak > values["current"]:
                self._kept_peaks.setdefault(index, {})[name] = peak
        self._reset(index)

    def _take(self, index: int) -> None:
        stats = self.of(index)
        for tracker in self._trackers:
            tracker.take(index, stats)

    def _keep_counts(self, index: int) -> None:
        self._past_counts[index] = self.counts(index)

    def add(self, tracker: CudaTracker) -> None:
        """Add an open tracker; from now on, peaks are stored before user code's resets."""
        self._patch()
        self._trackers.append(tracker)

    def drop(self, tracker: CudaTracker) -> None:
        """Remove a tracker."""
        if tracker in self._trackers:
            self._trackers.remove(tracker)
            self._settle()

    def restore(self) -> None:
        """Restore torch's functions, even if user code then reads other peaks."""
        self._kept_peaks.clear()
        self._patches.restore()
        self._is_patched = False

    def _settle(self) -> None:
        """Restore torch's functions if user code then reads the same peaks."""
        if self._trackers:
            return
        for index, kept in list(self._kept_peaks.items()):
            peaks = {
                name: each["peak"] for name, each in _with_peaks(self._read(index))
            }
            if all(peaks.get(name, 0) >= peak for name, peak in kept.items()):
                del self._kept_peaks[index]
        if not self._kept_peaks:
            self.restore()

    def _patch(self) -> None:
        if self._is_patched:
            return
        self._is_patched = True
        functions: Any = torch._C  # noqa: SLF001  # no public API
        self._read = functions._cuda_memoryStats  # noqa: SLF001  # no public API
        self._reset = functions._cuda_resetPeakMemoryStats  # noqa: SLF001  # no public API
        for name, wrapper in (
            ("_cuda_memoryStats", self._reading),
            ("_accelerator_getDeviceStats", self._reading),
            ("_cuda_resetPeakMemoryStats", self._resetting_peaks),
            ("_accelerator_resetPeakStats", self._resetting_peaks),
            ("_cuda_resetAccumulatedMemoryStats", self._resetting_counts),
            ("_accelerator_resetAccumulatedStats", self._resetting_counts),
        ):
            original = getattr(functions, name, None)
            if original is not None:
                self._patches.set(functions, name, wrapper(original))

    def _reading(self, original: Any) -> Any:
        def read(index: int) -> Any:
            stats = original(index)
            if not getattr(self._reads_own, "value", False):
                kept = self._kept_peaks.get(index, {})
                for name, values in _with_peaks(stats):
                    values["peak"] = max(values["peak"], kept.get(name, 0))
            return stats

        return read

    def _resetting_peaks(self, original: Any) -> Any:
        def reset(index: int) -> None:
            self._take(index)
            original(index)
            self._kept_peaks.pop(index, None)
            self._settle()

        return reset

    def _resetting_counts(self, original: Any) -> Any:
        def reset(index: int) -> None:
            self._keep_counts(index)
            original(index)

        return reset


def _with_peaks(
    stats: Mapping[str, Any],
) -> Iterator[tuple[tuple[str, str], dict[str, int]]]:
    """Yield name, pool and values of each statistic that has a peak."""
    for name, pools in stats.items():
        if isinstance(pools, dict):
            for pool, values in pools.items():
                if isinstance(values, dict) and "peak" in values:
                    yield (name, pool), values


class CudaTracker:
    """Peaks of one real card, measured by resetting torch's own peak statistics.

    User code still reads its own peaks; see Note [Peaks of user code].

    Args:
        statistics: The statistics, shared by all trackers.
        index: The card.
        counted: Returns the bytes that NVML counts on a card.
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
        """Store the peaks since the last reset."""
        if index == self._index:
            for name in _PEAKS:
                peak = stats.get(f"{name}_bytes.all.peak", 0)
                self._peaks[name] = max(self._peaks[name], peak)

    def read(self) -> MemoryFigures:
        """Return the figures so far."""
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
            # The allocator's peak is exact. Memory outside the allocator is seldom freed.
            peak_process_bytes=None
            if beside is None
            else self._peaks["reserved"] + beside,
            end_requested_bytes=stats.get("requested_bytes.all.current", 0),
            end_active_bytes=stats.get("active_bytes.all.current", 0),
        )

    def peek(self) -> MemoryFigures:
        """Return the figures so far."""
        return self.read()

    def close(self) -> MemoryFigures:
        """Stop tracking and return the final figures."""
        figures = self.read()
        self._statistics.drop(self)
        return figures
