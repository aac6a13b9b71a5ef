"""The simulated cards of one process: drivers, allocators, budgets, streams."""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from pytest_gpumem.devices.budgets import Budgets
from pytest_gpumem.errors import DeviceUnavailableError
from pytest_gpumem.model.allocator import CachingAllocator, OutOfMemory
from pytest_gpumem.model.config import AllocatorConfig, config_from_environment
from pytest_gpumem.model.driver import Driver
from pytest_gpumem.model.oom_text import ProcessMemory
from pytest_gpumem.model.workspaces import workspace_bytes

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
        index: int,
        card: Card,
        config: AllocatorConfig,
    ) -> None:
        self.machine: Final = machine
        self.index: Final = index
        self.card: Final = card
        self.value_device: Final = machine.value_device
        self.driver: Final = Driver(card.total_bytes, other_bytes=card.context_bytes)
        self.allocator: Final = CachingAllocator(
            self.driver,
            config=config,
            device_index=index,
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
        self._budgets: Final = Budgets()

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
        refuse = False
        for fault in () if is_internal else self.faults:
            refuse = fault(self.index, nbytes) or refuse
        with self._lock:
            self._drain()
            self.num_requests += 1
            block = self.allocator.malloc(nbytes, stream, refuse=refuse)
            try:
                later = self._observe(block)
            except BaseException:  # the program is being interrupted
                self.allocator.free(block)
                raise
        try:
            for each in later:
                each(nbytes)
        except BaseException:
            self.release(block)
            raise
        return block

    def _observe(self, block: Block) -> list[Callable[[int], None]]:
        """Have a new block seen; return what is to be called without the lock."""
        history = self.machine.history
        block.frames = None if history is None else history.frames()
        self._trace(block.address, block.size)
        # Under the lock, so that no other thread's release hides a peak.
        totals = self.allocator.allocated_bytes, self.allocator.reserved_bytes
        return [*filter(None, (each(self.index, *totals) for each in self.watchers))]

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
        """The smallest budget in force in bytes, or None where there is none."""
        return self._budgets.smallest

    def set_budget(self, budget_bytes: int | None, *, owner: object = None) -> None:
        """Cap reserved bytes for an owner (inclusive); None takes its cap back.

        A fraction that user code sets holds beside it: the smallest counts.

        Raises:
            BudgetError: The budget is not between one byte and the card's total.
        """
        with self._budgets.lock:
            self._budgets.put(
                owner,
                budget_bytes,
                total_bytes=self.driver.total_bytes,
                index=self.index,
                name=self.card.name,
            )
            smallest = self._budgets.smallest
            with self.locked() as allocator:
                allocator.set_budget(smallest)
                if smallest is not None and allocator.reserved_bytes > smallest:
                    # A cached segment would serve requests whatever the cap.
                    allocator.empty_cache()

    @property
    def fraction(self) -> float:
        """What ``set_per_process_memory_fraction`` was last given; 1.0 at first."""
        fraction = self.allocator.memory_fraction
        return 1.0 if fraction is None else fraction

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        with self.locked() as allocator:
            allocator.set_memory_fraction(fraction)

    def mem_get_info(self) -> tuple[int, int]:
        """Return free and total bytes as a card shared with others shows them.

        Under a budget, free is at most what the budget still leaves.
        """
        with self.locked() as allocator:
            free = self.driver.free_bytes
            budget = self._budgets.smallest
            if budget is not None:
                left = budget - allocator.reserved_bytes
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
        cards: One card for each device index, at least one.
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
        self.cards: Final = tuple(
            SimulatedCard(self, index, card, settings)
            for index, card in enumerate(cards)
        )
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
    def current_index(self) -> int:
        """Index of the calling thread's current device."""
        return getattr(self._local, "index", 0)

    @current_index.setter
    def current_index(self, index: int) -> None:
        if not 0 <= index < len(self.cards):
            raise RuntimeError(INVALID_ORDINAL)
        self._local.index = index

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
        for card in self.cards:
            with card.locked() as allocator:
                allocator.trace = partial(history.note, card.index)

    def stop_history(self) -> None:
        """Keep no more changes, and forget those kept."""
        self.history = None
        for card in self.cards:
            with card.locked() as allocator:
                allocator.trace = None

    def after_fork(self) -> None:
        """Be what CUDA is in a forked child: of no use, if the parent had used it.

        Source: ``torch/cuda/__init__.py``, ``_lazy_init``.
        """
        self.is_forked = self.is_forked or self.is_initialized
        self.is_initialized = False
        for card in self.cards:
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
        return sum(card.num_requests for card in self.cards)


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
    machine = current_machine()
    if index is None:
        index = machine.current_index
    if not 0 <= index < len(machine.cards):
        raise RuntimeError(INVALID_ORDINAL)
    return machine.cards[index]


__all__ = [
    "INVALID_ORDINAL",
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
