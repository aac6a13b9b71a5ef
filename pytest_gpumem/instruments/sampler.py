"""Samples figures in a thread over a block of code, and keeps the peaks."""

from __future__ import annotations

import functools
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.devices.nvml import Reading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.devices import Device, Tracker
    from pytest_gpumem.records.memory_figures import MemoryFigures

_S = TypeVar("_S", bound="Sampler")

#: Seconds between two samples.
PERIOD_S: Final = 0.05
#: After a sample the thread waits this many times a sample's processor time, so that
#: sampling costs about 1 %.
_REST: Final = 100


class Sampler:
    """Take samples in a thread, over a block.

    The thread is stopped while the process is forked.

    Args:
        period_s: The least seconds between two samples; more if a sample takes long.
    """

    def __init__(self, period_s: float) -> None:
        self._period_s: Final = period_s
        self._wake: Final = threading.Event()
        self._thread: threading.Thread | None = None

    def sample(self) -> None:
        """Take a sample now."""
        raise NotImplementedError

    def __enter__(self: _S) -> _S:  # noqa: PYI019  # Self needs Python 3.11
        self.sample()
        _register()
        _active.append(self)
        self.resume()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the last sample; safe to call twice."""
        if self in _active:
            _active.remove(self)
            self.pause()
            self.sample()

    def pause(self) -> None:
        """Stop the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._wake.set()
            thread.join()

    def resume(self) -> None:
        """Start the thread."""
        self._wake.clear()
        self._thread = threading.Thread(
            target=self._run, name="gpumem-sampler", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        rest_s, last_s = self._period_s, 0.0
        while not self._wake.wait(rest_s):
            before_s = time.thread_time()
            self.sample()
            spent_s = time.thread_time() - before_s
            # The time of a garbage collection during a sample does not count, because the
            # thread would then rest a hundred times as long.
            rest_s = rest_after(min(spent_s, last_s), self._period_s)
            last_s = spent_s


class MemorySampler(Sampler):
    """Sample NVML's bytes of this process and of every card, over a block.

    Args:
        device: The device; None means the active device.
        period_s: The least seconds between two samples; more if a sample takes long.

    Limits: bytes that are allocated and freed between two samples are not seen. The thread
    is stopped while the process is forked.

    Raises:
        DeviceUnavailableError: There is no active device.

    Example::

        with MemorySampler() as sampler:
            train()
        print(sampler.peak(0).card_bytes)
    """

    def __init__(
        self, *, device: Device | None = None, period_s: float = PERIOD_S
    ) -> None:
        super().__init__(period_s)
        self._device: Final = active_device() if device is None else device
        self._last: Final[dict[int, Reading]] = {}
        self._most: Final[dict[int, tuple[int, int]]] = {}
        self._lock: Final = threading.Lock()

    def peak(self, index: int) -> Reading:
        """Return the largest samples of a card so far.

        If NVML did not report a figure in the last sample, the figure is None, with the
        reason, because the peak may be larger than all samples.
        """
        with self._lock:
            last = self._last.get(index, Reading(None, None, "no sample was taken yet"))
            process, card = self._most.get(index, (0, 0))
        return Reading(
            None if last.process_bytes is None else process,
            None if last.card_bytes is None else card,
            last.why,
        )

    def sample(self) -> None:
        """Take a sample now."""
        with self._lock:
            for index in range(self._device.device_count):
                now = self._last[index] = self._device.counted(index)
                process, card = self._most.get(index, (0, 0))
                self._most[index] = (
                    max(process, now.process_bytes or 0),
                    max(card, now.card_bytes or 0),
                )


def rest_after(spent_s: float, period_s: float) -> float:
    """Return the seconds to wait after a sample, from its processor time."""
    return max(period_s, _REST * spent_s)


class SampledTracker:
    """A tracker of a card; its figures include samples of NVML."""

    def __init__(self, tracker: Tracker, sampler: MemorySampler, index: int) -> None:
        self._tracker: Final = tracker
        self._sampler: Final = sampler
        self._index: Final = index

    def read(self) -> MemoryFigures:
        """Return the figures up to now."""
        self._sampler.sample()
        return self._with_samples(self._tracker.read())

    def peek(self) -> MemoryFigures:
        """Return the figures up to now, without a sample."""
        return self._with_samples(self._tracker.peek())

    def close(self) -> MemoryFigures:
        """Return the final figures; the first tracker that is closed ends the sampling."""
        self._sampler.close()
        return self._with_samples(self._tracker.close())

    def _with_samples(self, figures: MemoryFigures) -> MemoryFigures:
        sampled = self._sampler.peak(self._index)
        process = figures.peak_process_bytes
        if process is not None:
            process = max(process, sampled.process_bytes or 0)
        return replace(
            figures, peak_process_bytes=process, peak_card_bytes=sampled.card_bytes
        )


def sampled(device: Device, trackers: Sequence[Tracker]) -> list[Tracker]:
    """Start to sample NVML, and return trackers with the samples."""
    sampler = MemorySampler(device=device).__enter__()
    return [
        SampledTracker(tracker, sampler, index)
        for index, tracker in enumerate(trackers)
    ]


_active: Final[list[Sampler]] = []


def _pause_all() -> None:
    for sampler in _active:
        sampler.pause()


def _resume_all() -> None:
    for sampler in _active:
        sampler.resume()


@functools.cache
def _register() -> None:
    """Stop the threads while the process is forked.

    A forked child has no copy of the thread, so a lock that the thread held would never be
    released there. Python also warns about a fork while threads run.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows
        os.register_at_fork(
            before=_pause_all, after_in_parent=_resume_all, after_in_child=_active.clear
        )
