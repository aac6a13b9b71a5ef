"""Records the peak bytes of a block of code."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.instruments.sites import describe_site
from pytest_gpumem.sizes import format_size
from pytest_gpumem.stacks import calling_frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices import Device, Tracker
    from pytest_gpumem.instruments.witness import OomWitness
    from pytest_gpumem.records.memory_figures import MemoryFigures


class PeakRecorder:
    """Record peak bytes of a card over a block; blocks nest.

    Args:
        device_index: The card.
        device: The device; None means the active device.

    Raises:
        DeviceUnavailableError: There is no active device.

    Example::

        with PeakRecorder() as recorder:
            model(batch)
        assert recorder.figures.peak_allocated_bytes < 2 * 2**30
    """

    def __init__(self, *, device_index: int = 0, device: Device | None = None) -> None:
        self._device = device
        self._index = device_index
        self._tracker: Tracker | None = None
        self._final: MemoryFigures | None = None

    @property
    def figures(self) -> MemoryFigures:
        """The figures: up to now inside the block, final after it.

        Raises:
            RuntimeError: The block was not entered.
        """
        if self._final is not None:
            return self._final
        if self._tracker is None:
            raise RuntimeError("the recorder was not entered; use it in a with block")
        return self._tracker.read()

    def __enter__(self) -> PeakRecorder:  # noqa: PYI034  # Self needs Python 3.11
        device = active_device() if self._device is None else self._device
        self._final = None
        self._tracker = device.open_tracker(self._index)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._tracker is not None:
            self._final = self._tracker.close()


class LimitWatch:
    """Note where a block first went over a limit.

    Args:
        limit_bytes: The limit, inclusive.
        metric: One of ``"allocated"``, ``"reserved"``, ``"fragmented"`` (reserved and not
            allocated, at the allocated peak), ``"activations"`` (which is not watched) and
            ``"process"`` (reserved and context; the context is not watched, so a broken
            limit may be noticed late).
        device_index: The card.
        device: The device.
        witness: Gets a description of the moment; None if nobody needs it.

    Attributes:
        site: ``"file.py:42 in function (phase)"`` of the request that went over the
            limit, as near to the user's code as possible; for ``"fragmented"``, of the
            request that made the allocated peak. None if no request did, or if the
            device does not report it (a real card).
    """

    def __init__(
        self,
        limit_bytes: int,
        *,
        metric: str,
        device_index: int,
        device: Device,
        witness: OomWitness | None = None,
    ) -> None:
        self._witness = witness
        self._limit = limit_bytes
        self._metric = metric
        self._index = device_index
        self._device = device
        self._stack = ExitStack()
        self._most_allocated = 0
        self.site: str | None = None

    def __enter__(self) -> LimitWatch:  # noqa: PYI034  # Self needs Python 3.11
        self._stack.enter_context(self._device.watching(self._watch))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _watch(
        self, device_index: int, allocated: int, reserved: int
    ) -> Callable[[int], None] | None:
        if device_index != self._index or self._metric == "activations":
            return None
        if self._metric == "fragmented":
            self._watch_peak(allocated, reserved - allocated)
            return None
        if self.site is not None:
            return None
        if (allocated if self._metric == "allocated" else reserved) <= self._limit:
            return None
        self.site = describe_site(calling_frame(), exact=True)
        return None if self._witness is None else self._tell

    def _watch_peak(self, allocated: int, fragmented: int) -> None:
        """Note the site of the highest peak so far, if it breaks the limit."""
        if allocated > self._most_allocated:
            self._most_allocated = allocated
            is_over = fragmented > self._limit
            frame = calling_frame()
            self.site = describe_site(frame, exact=True) if is_over else None

    def _tell(self, nbytes: int) -> None:
        """Describe the moment as soon as calls to the device are possible."""
        if self._witness is not None:
            limit = f"the limit of {format_size(self._limit)} {self._metric}"
            self._witness.note(self._index, nbytes, calling_frame(), limit=limit)
