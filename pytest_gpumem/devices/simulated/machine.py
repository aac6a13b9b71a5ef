"""The simulated cards of one process: drivers, allocators, budgets, streams."""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.fractions import fraction_for
from pytest_gpumem.errors import BudgetError, DeviceUnavailableError
from pytest_gpumem.model.allocator import CachingAllocator, OutOfMemory
from pytest_gpumem.model.config import AllocatorConfig, config_from_environment
from pytest_gpumem.model.driver import Driver
from pytest_gpumem.model.oom_text import ProcessMemory
from pytest_gpumem.model.workspaces import workspace_bytes
from pytest_gpumem.visibility import VARIABLE, visible_numbers, why_hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_gpumem.cards import Card
    from pytest_gpumem.devices.simulated.history import History
    from pytest_gpumem.model.blocks import Block

#: What torch says of a device index that is not there (cudaErrorInvalidDevice).
INVALID_ORDINAL: Final = (
    "CUDA error: invalid device ordinal\n"
    "GPU device may be out of range, do you have enough GPUs?"
)


#: What torch says where CUDA sees no card.
#: Source: ``c10/cuda/CUDAFunctions.cpp``, ``device_count_ensure_non_zero``.
NO_CARDS: Final = "No CUDA GPUs are available"

#: What a simulated machine may keep of tensors' values.
VALUES: Final = ("computed", "none")


class SimulatedCard:
    """One card: its driver, its caching allocator and the lock around them.

    Every method may be called from any thread, and from a finaliser that runs in
    the middle of another call: such a release is queued and done by the call that
    holds the lock, or by the next one.
    """

    def __init__(
        self,
        machine: SimulatedMachine,
        number: int,
        card: Card,
        config: AllocatorConfig,
    ) -> None:
        self.machine: Final = machine
        #: What the machine calls it: NVML's index.
        self.number: Final = number
        self.card: Final = card
        self.value_device: Final = machine.value_device
        self.driver: Final = Driver(card.total_bytes, other_bytes=card.context_bytes)
        self.allocator: Final = CachingAllocator(
            self.driver,
            config=config,
            device_index=number,
            processes=self._processes,
        )
        self.faults: list[Callable[[int, int], bool]] = []
        #: Called after each allocation, under the lock; what one returns, without it.
        self.watchers: list[
            Callable[[int, int, int], Callable[[int], None] | None]
        ] = []
        #: Called after each change with card, address, bytes gained and both totals.
        self.tracers: list[Callable[[int, int, int, int, int], None]] = []
        self.num_requests = 0
        #: cuBLAS workspaces, by handle (a host thread's, or autograd's) and stream.
        self.workspaces: dict[tuple[object, int], Block] = {}
        self._lock = threading.Lock()
        self._released: deque[Block] = deque()
        self._budget_bytes: int | None = None
        self._fraction = self.allocator.memory_fraction

    @property
    def index(self) -> int:
        """What this process calls it, if it sees it: CUDA's index."""
        return self.allocator.device_index

    @index.setter
    def index(self, index: int) -> None:
        self.allocator.device_index = index

    @property
    def context_bytes(self) -> int:
        """What the driver counts for this process beside the allocator, in bytes.

        There is no context before the card is used.
        """
        return self.card.context_bytes if self.num_requests else 0

    def _processes(self) -> list[ProcessMemory]:
        """Return who holds what of the card, as NVML tells an allocator that asks.

        Whoever asks has a context.
        """
        driver = self.driver
        others = [ProcessMemory(*each) for each in driver.other_processes()]
        return [*others, ProcessMemory(None, driver.used_bytes + driver.other_bytes)]

    def renew_lock(self) -> None:
        """Be free of a thread that held the lock when this process was forked."""
        self._lock = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[CachingAllocator]:
        """Yield the allocator, with all queued releases done, under the lock."""
        with self._lock:
            self._drain()
            yield self.allocator

    def _drain(self) -> None:
        released = self._released
        while released:
            block = released.popleft()
            address, nbytes = block.address, block.size
            self.allocator.free(block)
            self._trace(address, -nbytes)

    def _trace(self, address: int, change: int) -> None:
        for tracer in self.tracers:
            tracer(
                self.index,
                address,
                change,
                self.allocator.allocated_bytes,
                self.allocator.reserved_bytes,
            )

    def allocate(
        self, nbytes: int, stream: int = 0, *, is_internal: bool = False
    ) -> Block:
        """Serve a request of ``nbytes`` bytes on a stream.

        Args:
            nbytes: Bytes, at least 1.
            stream: Handle of the stream.
            is_internal: Whether a library asks for itself; faults number only what
                operators return, which is what can be numbered on a real card too.

        Raises:
            OutOfMemory: Nothing that large is free within card and budget, or a
                fault refused the request.
        """
        __tracebackhide__ = True
        refuse, later = False, None
        for fault in () if is_internal else self.faults:
            refuse = fault(self.index, nbytes) or refuse
        with self._lock:
            self._drain()
            self.num_requests += 1
            block = self.allocator.malloc(nbytes, stream, refuse=refuse)
            history = self.machine.history
            block.frames = None if history is None else history.frames()
            self._trace(block.address, block.size)
            # Under the lock, so that no other thread's release hides a peak.
            for watcher in self.watchers:
                wanted = watcher(
                    self.index,
                    self.allocator.allocated_bytes,
                    self.allocator.reserved_bytes,
                )
                later = wanted or later
        if later is not None:
            later(nbytes)
        return block

    def release(self, block: Block) -> None:
        """Give a block back; safe in a finaliser."""
        self._released.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def hold_workspace(self, handle: object, stream: int) -> None:
        """Take the cuBLAS workspace of a handle on a stream.

        Raises:
            OutOfMemory: There is no room for it.
        """
        setting = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        nbytes = workspace_bytes(self.card.compute_capability, setting)
        block = self.allocate(nbytes, stream, is_internal=True)
        self.workspaces[handle, stream] = block

    def clear_workspaces(self) -> None:
        """Give every cuBLAS workspace back to the allocator."""
        while self.workspaces:
            self.release(self.workspaces.popitem()[1])

    # -- limits -----------------------------------------------------------------

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes, or None where there is none."""
        return self._budget_bytes

    def set_budget(self, budget_bytes: int | None) -> None:
        """Cap reserved bytes at ``budget_bytes`` (inclusive); None lifts the cap.

        A fraction that user code sets holds beside it: the smaller one counts.

        Raises:
            BudgetError: The budget is not between one byte and the card's total.
        """
        total = self.driver.total_bytes
        if budget_bytes is not None and not 0 < budget_bytes <= total:
            raise BudgetError(
                f"budget of {budget_bytes} bytes on cuda:{self.index}: accepted are "
                f"1 to {total} bytes, the total of {self.card.name}",
                value=budget_bytes,
            )
        self._budget_bytes = budget_bytes
        self._apply_limit()
        if budget_bytes is not None:
            # A cached segment would serve requests whatever the cap.
            with self.locked() as allocator:
                if allocator.reserved_bytes > budget_bytes:
                    allocator.empty_cache()

    @property
    def fraction(self) -> float:
        """What ``set_per_process_memory_fraction`` was last given; 1.0 at first."""
        return 1.0 if self._fraction is None else self._fraction

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        self._fraction = fraction
        self._apply_limit()

    def _apply_limit(self) -> None:
        fraction = self.fraction
        if self._budget_bytes is not None:
            total = self.driver.total_bytes
            fraction = min(fraction, fraction_for(self._budget_bytes, total))
        with self.locked() as allocator:
            allocator.set_memory_fraction(fraction)

    def mem_get_info(self) -> tuple[int, int]:
        """Return free and total bytes as a card shared with others shows them.

        Under a budget, free is at most what the budget still leaves.
        """
        with self.locked() as allocator:
            free = self.driver.free_bytes
            if self._budget_bytes is not None:
                left = self._budget_bytes - allocator.reserved_bytes
                free = min(free, max(left, 0))
            return free, self.driver.total_bytes

    # -- statistics -------------------------------------------------------------

    def memory_stats(self) -> dict[str, int]:
        """Return ``torch.cuda.memory_stats``'s flat dictionary."""
        with self.locked() as allocator:
            return allocator.memory_stats()

    def empty_cache(self) -> None:
        """Give every free segment back to the driver."""
        with self.locked() as allocator:
            allocator.empty_cache()


class SimulatedMachine:
    """The cards of a simulated machine, and which one is current in each thread.

    Args:
        cards: The machine's cards, at least one; ``CUDA_VISIBLE_DEVICES`` says which
            of them the process sees.
        config: Settings of the caching allocator, the same for every card; None takes
            the environment's.
        values: One of ``VALUES``: ``"computed"`` by the CPU, or ``"none"``, shapes and
            bytes only, for models larger than the host.

    Attributes:
        value_device: Type of the device that values lie on: ``"cpu"``, or ``"meta"``
            where there are none.
    """

    def __init__(
        self,
        cards: Sequence[Card],
        *,
        config: AllocatorConfig | None = None,
        values: str = "computed",
    ) -> None:
        if values not in VALUES:
            raise ValueError(f"values={values!r}; accepted are {', '.join(VALUES)}")
        self.value_device: Final = "cpu" if values == "computed" else "meta"
        settings = config if config is not None else config_from_environment()
        self.all_cards: Final = tuple(
            SimulatedCard(self, number, card, settings)
            for number, card in enumerate(cards)
        )
        #: Called where the cards that the process sees have become others.
        self.on_change: list[Callable[[], None]] = []
        self._cards: tuple[SimulatedCard, ...] | None = None
        self._listed: str | None = None
        self._is_used = False
        #: Whether anything was put on a card: torch's "CUDA is initialized".
        self.is_initialized = False
        #: Whether this process was forked from one that had put something on a card.
        self.is_forked = False
        self.history: History | None = None
        #: Called with card and bytes once a request has failed and no lock is held.
        self.oom_observers: list[Callable[[int, int], None]] = []
        #: User code's, as torch calls them: card, segment bytes, limit, free bytes.
        self.user_oom_observers: list[Callable[[int, int, int, int], object]] = []
        self._local = threading.local()

    @property
    def cards(self) -> tuple[SimulatedCard, ...]:
        """The cards that the process sees; until CUDA is used, as it would see them."""
        if not self._is_used:
            self._look()
        return self._cards or ()

    def use(self) -> None:
        """Use CUDA: from the first time on, the process sees the same cards.

        See Note [When the variable is read].
        """
        if not self._is_used:
            self._look()
            self._is_used = True

    def _look(self) -> None:
        listed = os.environ.get(VARIABLE)
        if self._cards is not None and listed == self._listed:
            return
        before, self._listed = self._cards, listed
        numbers = visible_numbers(len(self.all_cards))
        self._cards = tuple(self.all_cards[number] for number in numbers)
        for index, card in enumerate(self._cards):
            card.index = index
        if before is not None and before != self._cards:
            for changed in tuple(self.on_change):
                if changed in self.on_change:  # not taken back by another of them
                    changed()

    @property
    def why_none(self) -> str:
        """Why the process sees no card, and what to do, as half a sentence."""
        if os.environ.get(VARIABLE) == self._listed:
            return f"{why_hidden()}; unset it"
        return (
            f"{VARIABLE}={self._listed!r} hid every card when this process first used "
            "CUDA; give the code that set it a process of its own"
        )

    @property
    def current_index(self) -> int:
        """Index of the calling thread's current device."""
        return getattr(self._local, "index", 0)

    @current_index.setter
    def current_index(self, index: int) -> None:
        self.card(index)
        self._local.index = index

    def card(self, index: int | None = None) -> SimulatedCard:
        """Use CUDA, and return a card; None means the thread's current one.

        Raises:
            RuntimeError: There is no such card (torch's text).
        """
        self.use()
        if not self.cards:
            raise RuntimeError(NO_CARDS)
        if index is None:
            index = self.current_index
        if not 0 <= index < len(self.cards):
            raise RuntimeError(INVALID_ORDINAL)
        return self.cards[index]

    def current_stream(self, index: int) -> int:
        """Return the handle of the thread's current stream on a device."""
        streams: dict[int, int] = getattr(self._local, "streams", {})
        return streams.get(index, 0)

    def set_stream(self, index: int, stream: int) -> None:
        """Make a stream current on a device, for the calling thread."""
        if not hasattr(self._local, "streams"):
            self._local.streams = {}
        self._local.streams[index] = stream

    def start_history(self, history: History) -> None:
        """Keep every change of memory from here on."""
        self.stop_history()
        self.history = history
        for card in self.all_cards:
            with card.locked() as allocator:
                allocator.trace = partial(_note, history, card)

    def stop_history(self) -> None:
        """Keep no more changes, and forget those kept."""
        self.history = None
        for card in self.all_cards:
            with card.locked() as allocator:
                allocator.trace = None

    def after_fork(self) -> None:
        """Be what CUDA is in a forked child: of no use, if the parent had used it.

        Source: ``torch/cuda/__init__.py``, ``_lazy_init``.
        """
        self.is_forked = self.is_forked or self.is_initialized
        self.is_initialized = False
        for card in self.all_cards:
            card.renew_lock()

    def tell_oom(self, index: int, error: OutOfMemory) -> None:
        """Tell the observers of a request that failed; they may ask anything."""
        card = self.cards[index]
        total, limit = card.driver.total_bytes, card.allocator.limit_bytes
        for user in list(self.user_oom_observers):
            free = card.driver.free_bytes
            user(index, error.segment_bytes, total if limit is None else limit, free)
        for observe in list(self.oom_observers):
            observe(index, error.nbytes)

    @property
    def num_requests(self) -> int:
        """How many allocations all cards were asked for so far."""
        return sum(card.num_requests for card in self.all_cards)


def _note(history: History, card: SimulatedCard, *change: Any) -> None:
    history.note(card.index, *change)


_machines: Final[list[SimulatedMachine]] = []


def _after_fork() -> None:
    """Renew the machines; the host, which computes for their cards, has one thread left.

    The child has none of its parent's OpenMP threads, and libgomp waits for them for
    ever. One thread asks for no other; torch has it so in workers of a DataLoader
    (``torch/utils/data/_utils/worker.py``, ``_worker_loop``).
    """
    if _machines:
        torch.set_num_threads(1)
    for machine in _machines:
        machine.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_after_fork)


def push_machine(machine: SimulatedMachine) -> None:
    """Make a machine the one that "cuda" means, until it is popped."""
    _machines.append(machine)


def pop_machine(machine: SimulatedMachine) -> None:
    """Take a machine away again; the one before it is current once more."""
    _machines.remove(machine)


def innermost_machine() -> SimulatedMachine | None:
    """Return the machine that "cuda" means at present, or None."""
    return _machines[-1] if _machines else None


def current_machine() -> SimulatedMachine:
    """Return the machine that "cuda" means at present.

    Raises:
        DeviceUnavailableError: No simulated machine is installed.
    """
    if not _machines:
        raise DeviceUnavailableError(
            "no simulated CUDA device is installed; use "
            "pytest_gpumem.devices.simulated.simulated_device() or run under pytest "
            "with --gpu-backend=simulated"
        )
    return _machines[-1]


def card_of(index: int | None) -> SimulatedCard:
    """Return a card of the current machine; None means the thread's current one.

    Raises:
        RuntimeError: There is no such card (torch's text).
    """
    return current_machine().card(index)


__all__ = [
    "INVALID_ORDINAL",
    "NO_CARDS",
    "VALUES",
    "OutOfMemory",
    "SimulatedCard",
    "SimulatedMachine",
    "card_of",
    "current_machine",
    "innermost_machine",
    "pop_machine",
    "push_machine",
]
