"""The simulated machine as a ``Device``."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.devices.nvml import CardCount, Reading
from pytest_gpumem.devices.simulated.machine import OutOfMemory, innermost_machine
from pytest_gpumem.guards import Guarded
from pytest_gpumem.records.memory_figures import MemoryFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedCard, SimulatedMachine


_ANOTHER: Final = "another machine is simulated at the moment"


class SimulatedTracker:
    """Peaks of one simulated card; torch's own peak statistics are not changed.

    Args:
        machine: The machine of the card.
        index: CUDA's index of the card. It may refer to another card until CUDA is
            initialised; until then no card holds memory.
    """

    def __init__(self, machine: SimulatedMachine, index: int) -> None:
        self._machine: Final = machine
        self._index: Final = index
        self._start(machine.cards[index])
        machine.on_change.append(self._changed)

    def _changed(self) -> None:
        cards = self._machine.cards
        if self._index < len(cards):
            self._card.watchers.remove(self._watch)
            self._start(cards[self._index])

    def _start(self, card: SimulatedCard) -> None:
        self._card = card
        with card.locked() as allocator:
            self._allocator = allocator
            self._start_allocated = allocator.allocated_bytes
            self._start_ooms = allocator.num_ooms
            self._start_retries = allocator.num_alloc_retries
            self._allocated = allocator.allocated_bytes
            self._reserved = allocator.reserved_bytes
            self._fragmented = self._reserved - self._allocated
            self._requested = allocator.requested_bytes
            self._active = allocator.active_bytes
        card.watchers.append(self._watch)

    def _watch(self, _index: int, _allocated: int, _reserved: int) -> None:
        # Every value only grows while an allocation is served, so reading after each
        # allocation sees every peak.
        allocator = self._allocator
        if allocator.allocated_bytes > self._allocated:
            self._allocated = allocator.allocated_bytes
            self._fragmented = allocator.reserved_bytes - self._allocated
        self._reserved = max(self._reserved, allocator.reserved_bytes)
        self._requested = max(self._requested, allocator.requested_bytes)
        self._active = max(self._active, allocator.active_bytes)

    def read(self) -> MemoryFigures:
        """Return the figures so far."""
        with self._card.locked():
            return self.peek()

    def peek(self) -> MemoryFigures:
        """Return the figures so far; the caller must hold the card's lock."""
        allocator = self._allocator
        context_bytes = self._card.context_bytes
        return MemoryFigures(
            device_index=self._index,
            peak_allocated_bytes=self._allocated,
            peak_reserved_bytes=self._reserved,
            peak_requested_bytes=self._requested,
            peak_active_bytes=self._active,
            start_allocated_bytes=self._start_allocated,
            end_allocated_bytes=allocator.allocated_bytes,
            end_reserved_bytes=allocator.reserved_bytes,
            num_ooms=allocator.num_ooms - self._start_ooms,
            num_alloc_retries=allocator.num_alloc_retries - self._start_retries,
            context_bytes=context_bytes,
            peak_process_bytes=self._reserved + context_bytes,
            end_requested_bytes=allocator.requested_bytes,
            end_active_bytes=allocator.active_bytes,
            peak_fragmented_bytes=self._fragmented,
        )

    def close(self) -> MemoryFigures:
        """Stop tracking and return the final figures."""
        if self._watch in self._card.watchers:
            self._card.watchers.remove(self._watch)
            self._machine.on_change.remove(self._changed)
        return self.read()


class SimulatedDevice:
    """Implements the ``Device`` protocol with the cards of a ``SimulatedMachine``."""

    kind = "simulated"

    def __init__(self, machine: SimulatedMachine) -> None:
        self.machine = machine
        self._counts: dict[int, CardCount] = {}

    @property
    def device_count(self) -> int:
        """The number of cards."""
        return len(self.machine.cards)

    @property
    def num_requests(self) -> int:
        """The number of allocations requested so far on all cards."""
        return self.machine.num_requests

    def name(self, index: int) -> str:
        """Return a card's name."""
        return self.machine.cards[index].card.name

    def mem_get_info(self, index: int) -> tuple[int, int]:
        """Return free and total bytes; a budget limits the free bytes."""
        return self.machine.cards[index].mem_get_info()

    def total_bytes(self, index: int) -> int:
        """Return a card's total bytes, without reading other processes' bytes."""
        return self.machine.cards[index].driver.total_bytes

    def card_id(self, index: int) -> str:
        """Return a card's UUID in NVML's format."""
        return self.machine.cards[index].uuid

    def context_bytes(self, index: int) -> int:
        """Return the bytes that this process holds on the card outside the allocator."""
        return self.machine.cards[index].context_bytes

    def others_bytes(self, index: int) -> int:
        """Return the bytes of a card that other processes hold."""
        driver = self.machine.cards[index].driver
        return sum(nbytes for _pid, nbytes in driver.other_processes())

    def memory_stats(self, index: int) -> dict[str, int]:
        """Return the flat dictionary of ``torch.cuda.memory_stats``."""
        return self.machine.cards[index].memory_stats()

    def counted(self, index: int) -> Reading:
        """Return the present bytes from the simulated NVML of the innermost machine."""
        if index not in self._counts:
            # NVML lists a process that holds bytes of a simulated card.
            self._counts[index] = CardCount(index, lambda: False, self._handle)
        reading = self._counts[index].read()
        is_this = innermost_machine() is self.machine
        return reading if is_this else Reading(None, None, _ANOTHER)

    def _handle(self, pynvml: Any, index: int) -> Any:
        """Return NVML's handle of a card; torch's function would initialise CUDA."""
        return pynvml.nvmlDeviceGetHandleByUUID(self.card_id(index))

    def empty_cache(self) -> None:
        """Free cuBLAS workspaces and cached segments of every card."""
        for card in self.machine.cards:
            card.clear_workspaces()
            card.empty_cache()

    def budget(self, index: int) -> int | None:
        """Return the smallest budget that applies on a card, or None."""
        return self.machine.cards[index].budget_bytes

    def set_budget(
        self, index: int, budget_bytes: int | None, *, owner: object = None
    ) -> None:
        """Cap a card for an owner (inclusive); None removes the owner's cap.

        Raises:
            BudgetError: The budget is not between 1 byte and the card's total.
        """
        self.machine.cards[index].set_budget(budget_bytes, owner=owner)

    def block_bytes(self, storage: Any) -> int:
        """Return the bytes of a storage's block; 0 for a storage on the host."""
        memory = getattr(storage, "_gpumem", None)
        if memory is None or memory.block is None:
            return 0
        nbytes: int = memory.block.size
        return nbytes

    def block_address(self, storage: Any) -> int | None:
        """Return the address of a storage's block; None for a storage on the host."""
        memory = getattr(storage, "_gpumem", None)
        if memory is None or memory.block is None:
            return None
        address: int = memory.block.address
        return address

    def segments(self, index: int) -> list[dict[str, Any]]:
        """Return a card's segments; a recorded history gets no entry for this call."""
        with self.machine.cards[index].locked() as allocator:
            return allocator.snapshot()

    def holds(self, storage: Any, index: int) -> bool:
        """Return whether a storage is on a card of this machine."""
        memory = getattr(storage, "_gpumem", None)
        return memory is not None and memory.card is self.machine.cards[index]

    def open_tracker(self, index: int) -> SimulatedTracker:
        """Start tracking a card's peaks."""
        return SimulatedTracker(self.machine, index)

    def restore(self) -> None:
        """Do nothing, because trackers of a simulated card replace nothing."""

    @contextmanager
    def failing(self, fails: Callable[[int, int], bool]) -> Iterator[None]:
        """Call ``fails`` before each allocation to decide whether it must fail."""
        for card in self.machine.all_cards:
            card.faults.append(fails)
        try:
            yield
        finally:
            for card in self.machine.all_cards:
                card.faults.remove(fails)

    @contextmanager
    def observing_ooms(self, observe: Callable[[int, int], None]) -> Iterator[None]:
        """Call ``observe`` after each failed request."""
        observer = Guarded(observe)
        self.machine.oom_observers.append(observer)
        try:
            yield
        finally:
            self.machine.oom_observers.remove(observer)

    def fail_allocation(self, index: int, nbytes: int) -> str:
        """Fail a request as the allocator does; return the error message."""
        card = self.machine.cards[index]
        stream = self.machine.streams.current(index)
        try:
            with card.locked() as allocator:
                allocator.malloc(nbytes, stream, refuse=True)
        except OutOfMemory as error:
            self.machine.tell_oom(index, error)
            return error.message
        raise AssertionError("unreachable: a refused request is not served")

    @contextmanager
    def watching(
        self, watch: Callable[[int, int, int], Callable[[int], None] | None]
    ) -> Iterator[bool]:
        """Call ``watch`` after each allocation; always possible on simulated cards."""
        observer = Guarded(watch)
        for card in self.machine.all_cards:
            card.watchers.append(observer)
        try:
            yield True
        finally:
            for card in self.machine.all_cards:
                card.watchers.remove(observer)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record nothing, because ``tracing`` reports each change when it happens."""
        yield None

    @contextmanager
    def tracing(
        self, trace: Callable[[int, int, int, int, int], None]
    ) -> Iterator[bool]:
        """Call ``trace`` after each change; always possible on simulated cards."""
        observer = Guarded(trace)
        for card in self.machine.all_cards:
            card.tracers.append(observer)
        try:
            yield True
        finally:
            for card in self.machine.all_cards:
                card.tracers.remove(observer)
