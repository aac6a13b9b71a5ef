"""One simulated card: its driver, its allocator, its budgets and its observers."""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import torch

from pytest_gpumem.allocator.caching import CachingAllocator
from pytest_gpumem.allocator.driver import Driver
from pytest_gpumem.allocator.oom_text import ProcessMemory, cuda_error_text
from pytest_gpumem.devices.budgets import Budgets
from pytest_gpumem.kernels.cublas import workspace_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.allocator.config import AllocatorConfig
    from pytest_gpumem.cards import Card
    from pytest_gpumem.devices.simulated.machine import SimulatedMachine


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
        self.driver: Final = Driver(card.total_bytes, context_bytes=card.context_bytes)
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
        self._later: deque[Callable[[CachingAllocator], None]] = deque()
        self._budgets: Final = Budgets()

    @property
    def index(self) -> int:
        """CUDA's index of the card in this process, if the process sees it."""
        return self.allocator.device_index

    @index.setter
    def index(self, index: int) -> None:
        self.allocator.device_index = index

    @property
    def context_bytes(self) -> int:
        """Bytes of this process's context; 0 before there is one."""
        return self.driver.context_bytes if self.driver.has_context else 0

    def make_context(self) -> None:
        """Make this process's context, as the first use of a card does.

        Raises:
            torch.AcceleratorError: There is no room for it.
        """
        with self._lock:
            has_context = self.driver.make_context()
        if not has_context:
            # What ``cudaMalloc`` and ``cudaMemGetInfo`` return then is no matter of
            # the caching allocator's, which has no words of its own for it.
            raise torch.AcceleratorError(
                cuda_error_text("out of memory", "cudaErrorMemoryAllocation")
            )

    def _processes(self) -> list[ProcessMemory]:
        """Return the processes on the card with their bytes, as NVML returns them."""
        driver = self.driver
        others = [ProcessMemory(*each) for each in driver.other_processes()]
        return [*others, ProcessMemory(None, driver.process_bytes)]

    def after_fork(self) -> None:
        """In a forked child, drop the parent's lock and its context."""
        self._lock = threading.Lock()
        self.driver.has_context = False

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
            if self.tracers:
                self._trace(address, -nbytes)
        while self._later:
            self._later.popleft()(self.allocator)

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
            torch.AcceleratorError: There is no room for the context.
        """
        __tracebackhide__ = True
        if not self.driver.has_context:
            self.make_context()
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

    def _observe(self, block: Block) -> Sequence[Callable[[int], None]]:
        """Show a new block to observers; return functions to call without the lock."""
        history = self.machine.history
        block.frames = None if history is None else history.frames()
        if self.tracers:
            self._trace(block.address, block.size)
        if not self.watchers:
            return ()
        # Under the lock, so that no other thread's release hides a peak.
        totals = self.allocator.allocated_bytes, self.allocator.reserved_bytes
        return [*filter(None, (each(self.index, *totals) for each in self.watchers))]

    def release(self, block: Block) -> None:
        """Free a block; safe in a finaliser."""
        self._released.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def later(self, action: Callable[[CachingAllocator], None]) -> None:
        """Do something with the allocator as soon as possible; safe in a finaliser."""
        self._later.append(action)
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

    def take_beside(self, nbytes: int) -> int | None:
        """Take bytes outside PyTorch's allocator, as a library does.

        Returns:
            Where they are, or None where there is no room.
        """
        if not self.driver.has_context:
            self.make_context()
        with self._lock:
            return self.driver.malloc(nbytes)

    def give_back(self, address: int) -> None:
        """Free bytes that were taken outside PyTorch's allocator."""
        with self._lock:
            self.driver.free(address)

    def clear_workspaces(self, stream: int | None = None) -> None:
        """Free every cuBLAS workspace, or those on a stream."""
        for key in [*self.workspaces]:
            if stream in (None, key[1]):
                self.release(self.workspaces.pop(key))

    # -- limits -----------------------------------------------------------------

    @property
    def budget_bytes(self) -> int | None:
        """The smallest budget in force in bytes, or None where there is none."""
        return self._budgets.smallest

    def set_budget(self, budget_bytes: int | None, *, owner: object = None) -> None:
        """Cap reserved bytes for an owner (inclusive); None removes its cap.

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
        """The last fraction of ``set_per_process_memory_fraction``; 1.0 at first."""
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
