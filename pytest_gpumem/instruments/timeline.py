"""A test's memory over time, and what was live at its peak; both of bounded size."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.instruments.sites import describe_site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices import Device

#: Most points of a card's series; beyond, neighbours are merged.
MAX_POINTS: Final = 100
#: Most groups of live blocks that are told apart; the others are summed.
MAX_GROUPS: Final = 12


class Series:
    """A bounded series of (event, allocated, reserved) that keeps every peak's height.

    Of neighbours that are merged the one with more allocated stays.
    """

    def __init__(self) -> None:
        self._points: list[tuple[int, int, int]] = []
        self._stride = 1
        self._in_bucket = 0
        self._last: tuple[int, int, int] | None = None
        self.num_events = 0

    def add(self, allocated: int, reserved: int) -> None:
        """Take in one event."""
        self.num_events += 1
        self._last = point = (self.num_events, allocated, reserved)
        if self._in_bucket:
            if allocated >= self._points[-1][1]:
                self._points[-1] = point
        else:
            self._points.append(point)
        self._in_bucket = (self._in_bucket + 1) % self._stride
        if len(self._points) > MAX_POINTS and not self._in_bucket:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            odd = self._points[-1:] if len(self._points) % 2 else []
            self._points = [max(a, b, key=lambda each: each[1]) for a, b in pairs] + odd
            self._stride *= 2

    @property
    def points(self) -> list[tuple[int, int, int]]:
        """The series, with the last event as its last point."""
        if self._last is None or self._points[-1] == self._last:
            return list(self._points)
        return [*self._points, self._last]


class _Card:
    def __init__(self) -> None:
        self.series = Series()
        self.blocks: dict[int, tuple[int, str]] = {}
        self.by_site: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.peak = 0
        self.is_at_peak = False

    def gain(self, address: int, nbytes: int, allocated: int, site: str) -> None:
        self.blocks[address] = (nbytes, site)
        self.by_site[site] = self.by_site.get(site, 0) + nbytes
        if allocated > self.peak:
            self.peak, self.is_at_peak = allocated, True

    def lose(self, address: int) -> None:
        # The peak is copied only when it is over: mostly there are few of them.
        self.keep_peak()
        nbytes, site = self.blocks.pop(address, (0, ""))
        if nbytes:
            self.by_site[site] -= nbytes

    def keep_peak(self) -> None:
        if self.is_at_peak:
            self.at_peak, self.is_at_peak = dict(self.by_site), False


class Timeline:
    """Records a device's memory over a block of code.

    Args:
        device: The cards.

    Attributes:
        is_recorded: Whether the device shows its allocations (a real card does not).
    """

    def __init__(self, device: Device) -> None:
        self._device: Final = device
        self._stack: Final = ExitStack()
        self._cards: Final[dict[int, _Card]] = {}
        self._is_paused = False
        self.is_recorded = False

    def __enter__(self) -> Timeline:  # noqa: PYI034  # Self needs Python 3.11
        self.is_recorded = self._stack.enter_context(self._device.tracing(self._trace))
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing in a block: a sweep would say the same thousands of times."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _trace(
        self, index: int, address: int, change: int, allocated: int, reserved: int
    ) -> None:
        if self._is_paused:
            if change < 0 and index in self._cards:
                self._cards[index].lose(address)
            return
        card = self._cards.setdefault(index, _Card())
        if change < 0:
            card.lose(address)
        else:
            site = describe_site(sys._getframe(1))  # noqa: SLF001  # the documented way to walk a stack
            card.gain(address, change, allocated, site)
        card.series.add(allocated, reserved)

    def result(self) -> list[dict[str, Any]]:
        """Return for each card that was used what happened, as JSON can hold it."""
        cards = []
        for index, card in sorted(self._cards.items()):
            card.keep_peak()
            live = sorted(
                ((n, site) for site, n in card.at_peak.items() if n > 0), reverse=True
            )
            groups = [{"site": site, "bytes": n} for n, site in live[:MAX_GROUPS]]
            rest = sum(n for n, _site in live[MAX_GROUPS:])
            if rest:
                groups.append({"site": "other sites", "bytes": rest})
            before = card.peak - sum(n for n, _site in live)
            if before > 0:
                groups.append({"site": "held before the test", "bytes": before})
            cards.append(
                {
                    "device_index": index,
                    "budget_bytes": self._device.budget(index),
                    "total_bytes": self._device.mem_get_info(index)[1],
                    "num_events": card.series.num_events,
                    "peak_bytes": card.peak,
                    "points": card.series.points,
                    "live_at_peak": groups,
                }
            )
        return cards
