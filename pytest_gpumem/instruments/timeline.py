"""Records a test's memory over time and the blocks at its peak, in bounded size."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pytest_gpumem.guards import guarded
from pytest_gpumem.instruments.live_peak import LivePeak
from pytest_gpumem.instruments.live_tensors import living_models
from pytest_gpumem.instruments.module_parts import unseen
from pytest_gpumem.instruments.owners import NamedOwner, Owners
from pytest_gpumem.instruments.sites import (
    Line,
    chain_of,
    kind_of,
    site_of,
    starred,
)
from pytest_gpumem.records.live_groups import LiveBlock, group_blocks
from pytest_gpumem.records.memory_figures import KINDS
from pytest_gpumem.stacks import calling_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from pytest_gpumem.devices import Device
    from pytest_gpumem.devices.cuda_history import CudaHistory, MemoryChange
    from pytest_gpumem.instruments.owners import Node
    from pytest_gpumem.instruments.sites import Chain
    from pytest_gpumem.records.memory_figures import Kind

#: The most points of a card's series; if there are more, neighbours are merged.
MAX_POINTS: Final = 100
#: The most groups of live blocks; the other blocks form one more group.
MAX_GROUPS: Final = 12
#: The site of blocks that were on the card before.
BEFORE: Final = "held before the test"
#: The site of a request without a Python stack, on a real card.
AUTOGRAD: Final = "a thread that runs no Python code, as autograd's do (backward)"


class _Point(NamedTuple):
    """A moment of a series; ``kinds`` are the allocated bytes of each of ``KINDS``."""

    event: int
    allocated: int
    reserved: int
    kinds: list[int]


class Series:
    """A bounded series of (event, allocated, reserved) that keeps every peak's height.

    When two neighbours are merged, the one with more allocated bytes stays.
    """

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._stride = 1
        self._in_bucket = 0
        self._last: _Point | None = None
        self.num_events = 0

    def add(self, allocated: int, reserved: int, kinds: Iterable[int] = ()) -> None:
        """Add an event."""
        self.num_events += 1
        self._last = point = _Point(self.num_events, allocated, reserved, [*kinds])
        if self._in_bucket:
            if allocated >= self._points[-1].allocated:
                self._points[-1] = point
        else:
            self._points.append(point)
        self._in_bucket = (self._in_bucket + 1) % self._stride
        if len(self._points) > MAX_POINTS and not self._in_bucket:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            odd = self._points[-1:] if len(self._points) % 2 else []
            self._points = [
                max(a, b, key=lambda each: each.allocated) for a, b in pairs
            ] + odd
            self._stride *= 2

    def move(self, nbytes: int, old: Kind, new: Kind, since: int) -> None:
        """Move bytes from one kind to another, in all points from an event on."""
        before, after = _INDICES[old], _INDICES[new]
        for point in reversed(self._whole()):
            if point.event < since:
                return
            point.kinds[before] -= nbytes
            point.kinds[after] += nbytes

    @property
    def points(self) -> list[tuple[int, int, int]]:
        """The series, with the last event as its last point."""
        return [(each.event, each.allocated, each.reserved) for each in self._whole()]

    @property
    def kinds(self) -> dict[Kind, list[int]]:
        """The allocated bytes of each point, for each kind that has any."""
        columns = zip(*(each.kinds for each in self._whole()), strict=True)
        return {
            kind: list(column)
            for kind, column in zip(KINDS, columns, strict=False)
            if any(column)
        }

    def _whole(self) -> list[_Point]:
        if self._last is None or self._points[-1] is self._last:
            return self._points
        return [*self._points, self._last]


_INDICES: Final = {kind: index for index, kind in enumerate(KINDS)}


@dataclass(slots=True)
class _Block:
    """A block on a card, live or freed."""

    nbytes: int
    site: str
    kind: Kind = "unnamed"
    node: Node | None = None
    owner: NamedOwner | None = None
    #: The number of events before its allocation.
    since: int = 0

    def at_peak(self) -> LiveBlock:
        """Return the block's description."""
        owner = self.owner
        if owner is not None:
            path = (*owner.node.path, owner.name)
            model = owner.node.root.kind
            return LiveBlock(self.nbytes, self.site, model, path, owner.role, self.kind)
        site = self.site
        if self.node is not None:
            module = ".".join(self.node.path) or self.node.kind
            site = f"{site} in {starred(module)}"
        return LiveBlock(self.nbytes, site, kind=self.kind)


class SeenOwner(NamedTuple):
    """The owner of a block at a time, in microseconds since the epoch."""

    time_us: int
    card: int
    address: int
    nbytes: int
    owner: NamedOwner


class _Card:
    """A card's blocks.

    Args:
        before: The bytes that were allocated before the first event.
    """

    def __init__(self, before: int) -> None:
        self.series = Series()
        self.blocks: dict[int, _Block] = {}
        self.peak: Final = LivePeak[_Block]()
        #: The peak of the present phase.
        self._phase = LivePeak[_Block](before)
        #: The peak of each ended phase, and the blocks that were live at it.
        self._ended: dict[str, tuple[int, list[_Block]]] = {}
        #: Numbers of events after which an allocation failed.
        self.ooms: list[int] = []
        self._kinds = [0] * len(KINDS)
        self._kinds[_INDICES["unnamed"]] = before
        #: Bytes that were allocated before and are not known as blocks.
        self._before = before
        #: Addresses of blocks that were allocated while nothing was recorded.
        self._unseen: set[int] = set()

    def gain(self, address: int, allocated: int, block: _Block) -> None:
        block.since = self.series.num_events
        self.blocks[address] = block
        self._kinds[_INDICES[block.kind]] += block.nbytes
        self.peak.gain(address, allocated)
        self._phase.gain(address, allocated)

    def gain_unseen(self, address: int, nbytes: int) -> None:
        self._unseen.add(address)
        self._kinds[_INDICES["unnamed"]] += nbytes

    def lose(self, address: int, nbytes: int) -> None:
        block = self.blocks.pop(address, None)
        kind: Kind = "unnamed" if block is None else block.kind
        self._kinds[_INDICES[kind]] -= nbytes
        if address in self._unseen:
            self._unseen.remove(address)
            return
        if block is None:
            self._before -= nbytes
        self.peak.lose(address, block)
        self._phase.lose(address, block)

    def add(self, allocated: int, reserved: int) -> None:
        """Add an event to the series."""
        self.series.add(allocated, reserved, self._kinds)

    def claim(self, claim: SeenOwner) -> None:
        """Note the owner of a block; a block that is not known was there before the test.

        A block that is neither known nor a part of the bytes from before is ignored: it
        was allocated while nothing was recorded, or the history reports it too late.
        """
        block = self.blocks.get(claim.address)
        if block is None:
            if claim.address in self._unseen or claim.nbytes > self._before:
                return
            self._before -= claim.nbytes
            block = self.blocks[claim.address] = _Block(claim.nbytes, BEFORE)
        if block.owner is None or not claim.owner.role:
            block.owner = claim.owner
            self._tell(block, "gradients" if claim.owner.role else "weights")

    def _tell(self, block: _Block, kind: Kind) -> None:
        """Set the kind of a live block, also in the earlier points of the series."""
        if block.kind != kind:
            self._kinds[_INDICES[block.kind]] -= block.nbytes
            self._kinds[_INDICES[kind]] += block.nbytes
            self.series.move(block.nbytes, block.kind, kind, block.since + 1)
            block.kind = kind

    def at_peak(self) -> list[LiveBlock]:
        """Return the blocks that were live at the peak."""
        return [each.at_peak() for each in self.peak.live(self.blocks)]

    def end_phase(self, phase: str) -> None:
        """Keep the peak of the present phase under a name, and begin another phase."""
        self._ended[phase] = self._phase.nbytes, self._phase.live(self.blocks)
        self._phase = LivePeak[_Block](sum(self._kinds))

    def kinds_of(self, phase: str | None = None) -> dict[Kind, int]:
        """Return the bytes at the peak of an ended phase, or of the present one, by kind."""
        peak, live = (
            (self._phase.nbytes, self._phase.live(self.blocks))
            if phase is None
            else self._ended.get(phase, (0, []))
        )
        found = dict.fromkeys(KINDS, 0)
        for each in live:
            found[each.kind] += each.nbytes
        found["unnamed"] += max(0, peak - sum(found.values()))
        return {kind: nbytes for kind, nbytes in found.items() if nbytes}


class Timeline:
    """Records a device's memory over a block of code.

    Attributes:
        is_recorded: Whether the block was recorded. A real card's history is read at the
            end of the block; it is lost if the program under test ends the recording.
    """

    def __init__(self, device: Device) -> None:
        self._device: Final = device
        self._stack: Final = ExitStack()
        self._cards: Final[dict[int, _Card]] = {}
        self._owners: Final = Owners(device, self._claim)
        #: Models and optimisers to examine, once calls to the device are possible.
        self._unmet: list[Any] = []
        self._met_at: dict[int, int] = {}
        self._is_paused = False
        self._history: CudaHistory | None = None
        #: Owners of blocks that were found before the history is read.
        self._claims: list[SeenOwner] = []
        #: The ends of phases, and failed allocations by card, before the history is read.
        self._ends: list[tuple[int, str]] = []
        self._failures: list[tuple[int, int]] = []
        self._has_met = False
        self.is_recorded = False

    def __enter__(self) -> Timeline:  # noqa: PYI034  # Self needs Python 3.11
        self.is_recorded = self._stack.enter_context(self._device.tracing(self._trace))
        if self.is_recorded:
            self._stack.enter_context(self._device.watching(self._watch))
        else:
            self._history = self._stack.enter_context(self._device.recording())
            hook = register_optimizer_step_pre_hook(self._steps)
            self._stack.callback(hook.remove)
        self._stack.enter_context(self._device.observing_ooms(self._failed))
        self._owners.start()
        self._stack.callback(self._owners.stop)
        return self

    def __exit__(self, *_error: object) -> None:
        with self._stack:
            self._read()

    def meet_living(self) -> None:
        """On a real card, learn the names of every live model.

        The stacks of requests are read later there, without local variables.
        """
        if self._history is not None:
            self._meet(living_models())

    def _steps(self, optimizer: Any, *_call: Any) -> None:
        """On a real card, learn the owners of the gradients that a step will use."""
        if self._history is None:
            return
        if not self._has_met:
            self._has_met = True
            self.meet_living()
        self._meet([optimizer])

    def _read(self) -> None:
        """Read a real card's history, and stop recording it."""
        history, self._history = self._history, None
        changes = None if history is None else history.read()
        if changes is None:
            return
        self.is_recorded = True
        for index, each in enumerate(changes):
            self._replay(index, each)

    def _replay(self, index: int, changes: list[MemoryChange]) -> None:
        if not changes:
            return
        statistics = self._device.memory_stats(index)
        allocated = statistics.get("allocated_bytes.all.current", 0)
        reserved = statistics.get("reserved_bytes.all.current", 0)
        allocated -= sum(each.nbytes for each in changes)
        reserved -= sum(each.reserved_bytes for each in changes)
        card = self._cards[index] = _Card(max(0, allocated))
        notes: list[tuple[int, Callable[[], object]]] = [
            *(
                (each.time_us, partial(card.claim, each))
                for each in self._claims
                if each.card == index
            ),
            *((when, partial(card.end_phase, phase)) for when, phase in self._ends),
            *(
                (when, lambda: card.ooms.append(card.series.num_events))
                for when, failed in self._failures
                if failed == index
            ),
        ]
        waiting = deque(sorted(notes, key=lambda note: note[0]))
        sites: dict[tuple[Line, ...], tuple[str, Kind]] = {}
        for each in changes:
            while waiting and waiting[0][0] < each.time_us:
                waiting.popleft()[1]()
            allocated += each.nbytes
            reserved += each.reserved_bytes
            if each.nbytes > 0:
                lines = tuple(
                    Line(frame["filename"], frame["line"], frame["name"])
                    for frame in each.frames
                )
                if lines not in sites:
                    sites[lines] = (
                        (site_of(lines), kind_of(lines))
                        if lines
                        else (AUTOGRAD, "gradients")
                    )
                block = _Block(each.nbytes, *sites[lines])
                card.gain(each.address, allocated, block)
            elif each.nbytes:
                card.lose(each.address, -each.nbytes)
            else:
                continue
            card.add(allocated, reserved)
        for _when, act in waiting:
            act()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing in a block, because a sweep repeats the same events many times."""
        self._read()
        self._is_paused = True
        self._owners.stop()
        try:
            yield
        finally:
            self._is_paused = False
            self._owners.start()

    def _trace(
        self, index: int, address: int, change: int, allocated: int, reserved: int
    ) -> None:
        card = self._cards.get(index)
        if card is None:
            card = self._cards[index] = _Card(allocated - change)
        if change < 0:
            card.lose(address, -change)
        elif self._is_paused:
            card.gain_unseen(address, change)
        else:
            block = self._look(change, calling_frame())
            card.gain(address, allocated, block)
        if not self._is_paused:
            card.add(allocated, reserved)

    def _failed(self, index: int, _nbytes: int) -> None:
        if self._is_paused:
            return
        if self._history is not None:
            self._failures.append((time.time_ns() // 1000, index))
        elif index in self._cards:
            self._cards[index].ooms.append(self._cards[index].series.num_events)

    def end_phase(self, phase: str) -> None:
        """End a phase of the test, and begin the next one."""
        self._ends.append((time.time_ns() // 1000, phase))
        if self._history is None:
            for card in self._cards.values():
                card.end_phase(phase)

    def kinds_of(self, index: int, phase: str | None = None) -> dict[Kind, int] | None:
        """Return the bytes at the peak of an ended phase, or of the present one, by kind.

        Returns:
            None if they are not known yet, as on a real card before the end of the test.
        """
        if not self.is_recorded:
            return None
        card = self._cards.get(index)
        return {} if card is None else card.kinds_of(phase)

    def _look(self, nbytes: int, frame: FrameType) -> _Block:
        """Return a new block with the facts that follow from the stack."""
        chain = chain_of(frame)
        if chain.kind == "workspaces":
            site = f"cuBLAS workspace, first needed at {chain.site}"
            return _Block(nbytes, site, chain.kind)
        plain = _Block(nbytes, chain.site, chain.kind)
        return guarded(lambda: self._block(nbytes, frame, chain), otherwise=plain)

    def _block(self, nbytes: int, frame: FrameType, chain: Chain) -> _Block:
        module, parameter = chain.module_at(frame)
        if module is None:
            if chain.optimizer is not None:
                self._meet_optimizer(chain.optimizer_at(frame))
            return _Block(nbytes, chain.site, chain.kind)
        node = self._owners.known(module)
        if node is None:
            outer = chain.outermost_at(frame)
            self._unmet.append(module if outer is None else outer)
            node = self._owners.node(module)
        owner = NamedOwner(node, parameter) if parameter else None
        return _Block(nbytes, chain.site, chain.kind, node, owner)

    def _meet_optimizer(self, optimizer: Any) -> None:
        """Find an optimiser's gradients, if there was a new peak since the last call."""
        peak = sum(card.peak.nbytes for card in self._cards.values())
        if optimizer is not None and self._met_at.get(id(optimizer)) != peak:
            self._met_at[id(optimizer)] = peak
            self._unmet.append(optimizer)

    def _watch(
        self, _index: int, _allocated: int, _reserved: int
    ) -> Callable[[int], None] | None:
        return self._meet_those if self._unmet and not self._is_paused else None

    def _meet_those(self, _nbytes: int) -> None:
        unmet, self._unmet = self._unmet, []
        self._meet(unmet)

    def _meet(self, several: list[Any]) -> None:
        for each in several:
            is_module = issubclass(type(each), torch.nn.Module)
            meet = self._owners.meet if is_module else self._owners.meet_gradients
            with unseen():
                guarded(partial(meet, each), otherwise=None)

    def _claim(
        self, index: int, address: int, storage: torch.UntypedStorage, owner: NamedOwner
    ) -> None:
        if self._history is not None:
            now = time.time_ns() // 1000
            self._claims.append(SeenOwner(now, index, address, storage.nbytes(), owner))
            return
        nbytes = self._device.block_bytes(storage)
        if index not in self._cards:
            statistics = self._device.memory_stats(index)
            self._cards[index] = _Card(statistics["allocated_bytes.all.current"])
        self._cards[index].claim(SeenOwner(0, index, address, nbytes, owner))

    def result(self) -> list[dict[str, Any]]:
        """Return the events of each card that was used, as values of JSON."""
        cards = []
        for index, card in sorted(self._cards.items()):
            if not card.series.num_events:
                continue
            live = card.at_peak()
            groups = group_blocks(live, most=MAX_GROUPS)
            before = card.peak.nbytes - sum(each.nbytes for each in live)
            if before > 0:
                groups.append({"site": BEFORE, "bytes": before, "kind": "unnamed"})
            cards.append(
                {
                    "device_index": index,
                    "budget_bytes": self._device.budget(index),
                    "total_bytes": self._device.total_bytes(index),
                    "num_events": card.series.num_events,
                    "peak_bytes": card.peak.nbytes,
                    "points": card.series.points,
                    "live_at_peak": groups,
                    "kinds": card.series.kinds,
                    "ooms": card.ooms,
                }
            )
        return cards
