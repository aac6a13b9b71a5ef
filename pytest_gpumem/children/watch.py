"""Watches the cards of a child process from its start to its end."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.children.notes import Note
from pytest_gpumem.devices.environment import environment_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device, Tracker


class Watch:
    """Notes the peaks of this process's cards until it ends.

    Args:
        device: The cards.
        folder: The folder of the notes.
        indices: The run's index of each card.
        failed_counts: Returns how many allocations each rule has made fail so far.
    """

    def __init__(
        self,
        device: Device,
        folder: str,
        indices: Sequence[int],
        failed_counts: Callable[[], Sequence[int]] = lambda: (),
    ) -> None:
        self._device: Final = device
        self._folder: Final = folder
        self._indices: Final = indices
        self._failed_counts: Final = failed_counts
        self._stack = ExitStack()
        self._trackers: list[Tracker] = []
        self._requests = 0
        self._counts_before: Sequence[int] = ()
        self._peaks: dict[int, tuple[int, int]] = {}
        self._note: Note | None = None

    def start(self) -> None:
        """Begin; nothing is written until a card is used."""
        self._requests = self._device.num_requests
        self._counts_before = list(self._failed_counts())
        count = self._device.device_count
        self._trackers = [self._device.open_tracker(index) for index in range(count)]
        self._stack.enter_context(self._device.watching(self._watch))
        # A process that ends with os._exit does not call ``finish`` again.
        self._stack.enter_context(
            self._device.observing_ooms(lambda _index, _nbytes: self.finish())
        )
        atexit.register(self.finish)
        process: Any = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            _finish_with_multiprocessing(self)

    def stop(self) -> None:
        """Stop watching."""
        atexit.unregister(self.finish)
        self._stack.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []

    def finish(self) -> None:
        """Note the figures so far; they are the final ones if the process ends here."""
        if not self._trackers or self._device.num_requests == self._requests:
            return
        for index, tracker in enumerate(self._trackers):
            figures = tracker.read()
            if figures.peak_reserved_bytes or figures.num_ooms:
                self._require().write_card(self._indices[index], figures)
        self._count()

    def _watch(self, index: int, allocated: int, reserved: int) -> None:
        peaks = self._peaks.get(index, (0, 0))
        if allocated > peaks[0] or reserved > peaks[1]:
            self._peaks[index] = max(allocated, peaks[0]), max(reserved, peaks[1])
            figures = self._trackers[index].peek()
            self._require().write_card(self._indices[index], figures)
            self._count()

    def _count(self) -> None:
        now = list(self._failed_counts())
        before = [*self._counts_before, *[0] * (len(now) - len(self._counts_before))]
        failed = [each - old for each, old in zip(now, before, strict=False)]
        self._require().write(self._device.num_requests - self._requests, failed)

    def _require(self) -> Note:
        if self._note is None:
            self._note = Note(Path(self._folder), environment_of(self._device))
        return self._note


class ForkedChildren:
    """Watches children that are forked from this process.

    Only one object is active in a process at a time: the last that was started.
    """

    def __init__(self, make: Callable[[], Watch | None]) -> None:
        self._make: Final = make

    def start(self) -> None:
        """Start."""
        if not _hooked and hasattr(os, "register_at_fork"):
            _hooked.append(True)
            os.register_at_fork(after_in_child=_after_fork)
        _in_force.append(self)

    def stop(self) -> None:
        """Stop."""
        if self in _in_force:
            _in_force.remove(self)

    def forked(self) -> None:
        """Watch this process, which has just been forked."""
        watch = self._make()
        if watch is None:
            return
        watch.start()
        util: Any = sys.modules.get("multiprocessing.util")
        if util is not None:
            # Children of multiprocessing end with os._exit, and clear finalisers at their
            # start.
            util.register_after_fork(watch, _finish_with_multiprocessing)


def _finish_with_multiprocessing(watch: Watch) -> None:
    from multiprocessing.util import Finalize

    Finalize(None, watch.finish, exitpriority=0)


def _after_fork() -> None:
    if _in_force:
        _in_force[-1].forked()


_hooked: Final[list[bool]] = []
_in_force: Final[list[ForkedChildren]] = []
