"""Watches the limits of one test while it runs, and checks them when its phases end."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from pytest_gpumem.devices import allocated_bytes
from pytest_gpumem.plugin.record_keeping import record_of
from pytest_gpumem.records.record import LimitOutcome
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextlib import ExitStack

    from pytest_gpumem.devices import Device
    from pytest_gpumem.instruments.witness import OomWitness
    from pytest_gpumem.plugin import marks
    from pytest_gpumem.records.memory_figures import MemoryFigures
    from pytest_gpumem.records.record import Record


#: Metrics that are only known on a simulated card, and why.
_SIMULATED: Final = {
    "fragmented": "PyTorch does not report the reserved bytes at the allocated peak; run "
    "the test on a simulated card, or limit metric='reserved'",
    "activations": "only a simulated card knows which code requests memory while a test "
    "runs; run the test on one, or limit metric='allocated'",
}


class _Bound(NamedTuple):
    """A limit on one card of this run."""

    limit: marks.Limit
    device_index: int
    nbytes: int


class Limits:
    """The limits of one test on each card, for its call or for all of its phases.

    Args:
        device: The device.
        limits: The limits; a limit without a card applies to each card.
        witness: Describes the moment at which a limit is broken.
    """

    def __init__(
        self,
        device: Device,
        limits: Iterable[marks.Limit],
        witness: OomWitness | None = None,
    ) -> None:
        self._device = device
        self._witness = witness
        self._bounds = [
            _Bound(limit, index, limit.size.resolve(device.total_bytes(index)))
            for limit in limits
            for index in (
                range(device.device_count)
                if limit.device_index is None
                else (limit.device_index,)
            )
        ]
        self._sites: dict[_Bound, Any] = {}

    def watch(self, phase: str, stack: ExitStack) -> None:
        """Note where each limit is first broken, until the stack is closed."""
        from pytest_gpumem.instruments.recorder import LimitWatch

        for bound in self._of(phase):
            if bound in self._sites and self._sites[bound].site is not None:
                continue
            self._sites[bound] = stack.enter_context(
                LimitWatch(
                    bound.nbytes,
                    metric=bound.limit.metric,
                    device_index=bound.device_index,
                    device=self._device,
                    witness=self._witness,
                )
            )

    def check(self, phase: str, figures: Mapping[int, MemoryFigures]) -> str | None:
        """Return the broken limits of a phase in words, or None.

        A limit that cannot be checked counts as broken.
        """
        texts = [
            self._judge(bound, phase, figures[bound.device_index])
            for bound in self._of(phase)
            if bound.device_index in figures
        ]
        return "\n".join(filter(None, texts)) or None

    def _judge(self, bound: _Bound, phase: str, figures: MemoryFigures) -> str:
        """Return the broken limit of one card in words; empty if it holds."""
        about: str = bound.limit.metric
        peak = figures.peak(about)
        if peak is None and about in _SIMULATED:
            return (
                f"max_vram(metric={about!r}) cannot be checked on "
                f"cuda:{bound.device_index}: {_SIMULATED[about]}"
            )
        if peak is None and figures.peak_reserved_bytes > bound.nbytes:
            peak, about = figures.peak_reserved_bytes, f"{about} at least"
        if peak is None:
            why = why_unknown(self._device, bound.device_index)
            return (
                f"max_vram(metric={bound.limit.metric!r}) cannot be checked on "
                f"cuda:{bound.device_index}: process bytes unknown: {why}\n"
                f"{format_size(figures.peak_reserved_bytes)} of the limit of "
                f"{format_size(bound.nbytes)} were reserved at most; limit them "
                "with metric='reserved'"
            )
        if peak > bound.nbytes:
            more = self._where(bound, phase, figures)
            return (
                f"peak VRAM above max_vram: {about} {format_size(peak)} "
                f"({peak} bytes) on cuda:{bound.device_index}, limit "
                f"{format_size(bound.nbytes)} ({bound.nbytes} bytes), "
                f"{format_size(peak - bound.nbytes)} too much\n{more}"
            )
        return ""

    def outcomes(self, record: Record) -> list[LimitOutcome]:
        """Return each limit with the measured bytes, from a test's record."""
        peaks: dict[_Bound, int] = {}
        unknown: set[_Bound] = set()
        for figures in record.figures:
            for bound in self._of(figures.phase):
                if bound.device_index == figures.device_index:
                    peak = figures.peak(bound.limit.metric)
                    if peak is None:
                        # The process holds at least these.
                        peak = figures.peak_reserved_bytes
                        unknown.add(bound)
                    peaks[bound] = max(peak, peaks.get(bound, 0))
        return [
            LimitOutcome(
                bound.limit.metric,
                bound.device_index,
                bound.limit.phase,
                bound.nbytes,
                peaks.get(bound, 0),
                # A limit on bytes that are not known counts as broken.
                bound not in unknown and peaks.get(bound, 0) <= bound.nbytes,
            )
            for bound in self._bounds
            # Most tests start no process that uses a card, so there are no figures.
            if bound.limit.phase != "children" or bound in peaks
        ]

    def _of(self, phase: str) -> list[_Bound]:
        own = {"call": ("call", "test"), "children": ("children",)}
        of = own.get(phase, ("test",))
        return [bound for bound in self._bounds if bound.limit.phase in of]

    def _where(self, bound: _Bound, phase: str, figures: MemoryFigures) -> str:
        watch = self._sites.get(bound)
        where = f"in the test's {phase}"
        if watch is not None and watch.site:
            is_late = bound.limit.metric == "fragmented"
            how = "most was allocated" if is_late else "first over the limit"
            where = f"{how} at {watch.site}"
        if figures.start_allocated_bytes:
            start = format_size(figures.start_allocated_bytes)
            where += f"; {start} were allocated before the {phase} began"
        return where


def why_unknown(device: Device, index: int) -> str:
    """Return why this process's bytes on a card are not known."""
    return device.counted(index).why or "NVML could not tell at the time"


def fail(item: pytest.Item, text: str) -> None:
    """Fail a test for a broken limit, and mark the failure as such.

    Raises:
        pytest.fail.Exception: Always.
    """
    record_of(item).broken_limit = text.partition("\n")[0]
    pytest.fail(text, pytrace=False)


class LeakCheck:
    """Checks the bytes that a test leaves on the cards, without those of wider fixtures.

    Args:
        device: The device.
        item: The test, at the start of its setup.
        allowed: Bytes that may stay.
        held_by_fixtures: Returns the bytes that fixtures of wider scope hold.
    """

    def __init__(
        self, device: Device, item: pytest.Item, allowed: int, held_by_fixtures: int
    ) -> None:
        from pytest_gpumem.instruments.holders import blocks_on_cards

        self._device = device
        self._item = item
        self._allowed = allowed
        self._start = allocated_bytes(device) - held_by_fixtures
        self._blocks = blocks_on_cards()
        #: The result of the check; None before the check.
        self.outcome: LimitOutcome | None = None

    def check(self, held_by_fixtures: int) -> None:
        """Fail the test if it left more bytes than allowed.

        Raises:
            pytest.fail.Exception: It did; the text names what holds the bytes.
        """
        left = self._left(held_by_fixtures)
        if left <= self._allowed:
            self._note(left)
            return
        # pytest clears the test's fixture values only after the hooks of the teardown.
        getattr(self._item, "funcargs", {}).clear()
        gc.collect()
        self._device.empty_cache()
        left = self._left(held_by_fixtures)
        self._note(left)
        if left <= self._allowed:
            return
        from pytest_gpumem.instruments.holders import find_holders

        held = find_holders(self._device, self._blocks)
        lines = [
            f"VRAM leak: {format_size(left)} ({left} bytes) stay on the card after the "
            f"test; allowed are {format_size(self._allowed)}",
            *(f"  {each}" for each in held),
        ]
        fail(self._item, "\n".join(lines))

    def _note(self, left: int) -> None:
        self.outcome = LimitOutcome(
            "leak", None, "test", self._allowed, max(left, 0), left <= self._allowed
        )

    def _left(self, held_by_fixtures: int) -> int:
        return allocated_bytes(self._device) - held_by_fixtures - self._start
