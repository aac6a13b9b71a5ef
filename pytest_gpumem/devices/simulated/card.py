"""One simulated card: its driver, its allocator, its budgets and its observers."""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Final

from pytest_gpumem.allocator.caching import CachingAllocator
from pytest_gpumem.allocator.driver import Driver
from pytest_gpumem.allocator.oom_text import ProcessMemory
from pytest_gpumem.devices.budgets import Budgets
from pytest_gpumem.devices.cuda_errors import cuda_error
from pytest_gpumem.devices.simulated.cublas_handles import CublasHandles
from pytest_gpumem.devices.simulated.properties import DeviceProperties
from pytest_gpumem.kernels.cublas import workspace_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.allocator.config import AllocatorConfig
    from pytest_gpumem.cards import Card, Gpu
    from pytest_gpumem.devices.simulated.machine import SimulatedMachine

#: Each card has addresses of its own, as in CUDA, and none is 0. The driver's addresses
#: have fewer bits than this.
_BITS_OF_AN_ADDRESS: Final = 45


class SimulatedCard:
    """One card: its driver, its caching allocator and the lock around them.

    Every method may be called from any thread. Methods that free memory may also be called
    from a finaliser that runs during another call. The release is then queued, and the call
    that holds the lock, or the next call, executes it.
    """

    def __init__(
        self,
        machine: SimulatedMachine,
        number: int,
        card: Card,
        config: AllocatorConfig,
    ) -> None:
        self.machine: Final = machine
        #: The index of the card in the machine, which is NVML's index.
        self.number: Final = number
        self.card: Final = card
        self.value_device: Final = machine.value_device
        self.driver: Final = Driver(
            card.total_bytes,
            other_bytes=card.host_bytes or 0,
            context_bytes=card.context_bytes,
            first_address=number + 1 << _BITS_OF_AN_ADDRESS,
        )
        if card.is_integrated and card.host_bytes is None:
            # See Note [Memory that a card shares with the host].
            self.driver.host_bytes = machine.host_bytes
        self.allocator: Final = CachingAllocator(
            self.driver,
            config=config,
            device_index=number,
            processes=self._processes,
        )
        self.allocator.on_miss = self._collect
        self.faults: list[Callable[[int, int], bool]] = []
        #: Functions that are called after each allocation while the lock is held. Each may
        #: return a function, which is called after the lock is released.
        self.watchers: list[
            Callable[[int, int, int], Callable[[int], None] | None]
        ] = []
        #: Functions that are called after each change with card, address, added bytes and
        #: both totals.
        self.tracers: list[Callable[[int, int, int, int, int], None]] = []
        self.num_requests = 0
        self.cublas_handles = CublasHandles()
        #: cuBLAS workspaces, by handle and stream.
        self.workspaces: dict[tuple[int, int], Block] = {}
        #: How this version of PyTorch's allocator behaves.
        self.version: Final = config.version
        #: Whether a workspace is kept for the next product.
        #: Source: ``isCUDABlasWorkspaceCachingEnabled``.
        self.keeps_workspaces: Final = (
            config.version.keeps_workspaces
            or os.environ.get("TORCH_CUBLAS_WORKSPACE_CACHE") == "1"
        )
        self._lock = threading.Lock()
        self._released: deque[Block] = deque()
        self._later: deque[Callable[[CachingAllocator], None]] = deque()
        self._budgets: Final = Budgets()

    @property
    def index(self) -> int:
        """CUDA's index of the card in this process, if the card is visible."""
        return self.allocator.device_index

    @index.setter
    def index(self, index: int) -> None:
        self.allocator.device_index = index

    @property
    def uuid(self) -> str:
        """The card's UUID, or the slice's (MIG)."""
        return self.machine.uuids[self.number]

    @property
    def gpu(self) -> Gpu:
        """The GPU that the card is, or that contains the slice (MIG)."""
        return next(gpu for gpu in self.machine.gpus if self.number in gpu.numbers)

    @cached_property
    def properties(self) -> DeviceProperties:
        """One object for each card, as ``torch._C._cuda_getDeviceProperties`` returns."""
        return DeviceProperties(self.card, self.gpu, self.uuid)

    @property
    def context_bytes(self) -> int:
        """Bytes of this process's context; 0 if there is none."""
        return self.driver.context_bytes if self.driver.has_context else 0

    def make_context(self) -> None:
        """Create this process's context, as the first use of a card does.

        Raises:
            torch.AcceleratorError: The card has no room for the context, or this process
                is a forked child of one that has used the card.
        """
        self.check_context()
        with self._lock:
            has_context = self.driver.make_context()
        if not has_context:
            # ``cudaMalloc`` and ``cudaMemGetInfo`` return this error, and the caching
            # allocator has no message of its own for it.
            raise cuda_error("cudaErrorMemoryAllocation")

    def check_context(self) -> None:
        """Refuse work on the card in a forked child of a process that has used it.

        Raises:
            torch.AcceleratorError: This process is such a child (CUDA's message).
        """
        if self.machine.is_forked:
            raise cuda_error("cudaErrorInitializationError")

    def _processes(self) -> list[ProcessMemory]:
        """Return the processes on the card and their bytes, as NVML reports them."""
        if self.card.nvml_name:
            return []
        return [ProcessMemory(*each) for each in self.driver.processes()]

    def after_fork(self) -> None:
        """Discard the parent's lock and context in a forked child."""
        self._lock = threading.Lock()
        self.driver.has_context = False

    @contextmanager
    def locked(self) -> Iterator[CachingAllocator]:
        """Hold the lock, execute all queued releases, and yield the allocator."""
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

    def _collect(self) -> bool:
        """Free storages that were sent to other processes and are no longer used there.

        Source: ``trigger_free_memory_callbacks`` and ``cuda_ipc_collect``.
        """
        has_freed = self.machine.exchange.collect()
        if has_freed:
            self._drain()
        return has_freed

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
            nbytes: Requested bytes, at least 1.
            stream: Handle of the stream.
            is_internal: Whether the request is a library's own. Faults count only the
                memory of operators' results, because only that can be counted on a real
                card.

        Raises:
            OutOfMemory: The card and its budget have no room of that size, or a fault
                refused the request.
            torch.AcceleratorError: The card has no room for the context.
        """
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
            except BaseException:  # for example KeyboardInterrupt
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
        """Call the observers for a new block; return functions to call without the lock."""
        if self.tracers:
            self._trace(block.address, block.size)
        if not self.watchers:
            return ()
        # The lock is held, so that no other thread's release can hide a peak.
        totals = self.allocator.allocated_bytes, self.allocator.reserved_bytes
        return [*filter(None, (each(self.index, *totals) for each in self.watchers))]

    def release(self, block: Block) -> None:
        """Free a block; may be called in a finaliser."""
        self._released.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def later(self, action: Callable[[CachingAllocator], None]) -> None:
        """Call a function with the allocator as soon as possible; finalisers may use it."""
        self._later.append(action)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def hold_workspace(self, handle: int, stream: int) -> None:
        """Take the cuBLAS workspace of a handle on a stream.

        Raises:
            OutOfMemory: The card has no room for the workspace.
        """
        block = self.allocate(self.workspace_bytes, stream, is_internal=True)
        self.workspaces[handle, stream] = block

    @property
    def workspace_bytes(self) -> int:
        """The bytes of a workspace of cuBLAS."""
        setting = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        return workspace_bytes(self.card.compute_capability, setting)

    def take_beside(self, nbytes: int) -> int | None:
        """Allocate bytes outside PyTorch's allocator, as a library does.

        Returns:
            The address of the bytes, or None if there is no room.
        """
        if not self.driver.has_context:
            self.make_context()
        with self._lock:
            return self.driver.malloc(nbytes)

    def give_back(self, address: int) -> None:
        """Free bytes that were allocated outside PyTorch's allocator."""
        with self._lock:
            self.driver.free(address)

    def clear_workspaces(self, stream: int | None = None) -> None:
        """Free every cuBLAS workspace, or only those on a stream."""
        for key in [*self.workspaces]:
            if stream in (None, key[1]):
                self.release(self.workspaces.pop(key))

    # -- limits -----------------------------------------------------------------

    @property
    def budget_bytes(self) -> int | None:
        """The smallest budget in bytes that applies now, or None if there is none."""
        return self._budgets.smallest

    def set_budget(self, budget_bytes: int | None, *, owner: object = None) -> None:
        """Cap reserved bytes for an owner (inclusive); None removes the owner's cap.

        A memory fraction that user code sets applies as well: the smallest limit counts.

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
                    # Cached segments would serve requests even beyond the cap.
                    allocator.empty_cache()

    @property
    def fraction(self) -> float:
        """The last fraction of ``set_per_process_memory_fraction``; 1.0 by default."""
        fraction = self.allocator.memory_fraction
        return 1.0 if fraction is None else fraction

    @fraction.setter
    def fraction(self, fraction: float) -> None:
        with self.locked() as allocator:
            allocator.set_memory_fraction(fraction)

    def mem_get_info(self) -> tuple[int, int]:
        """Return free and total bytes, as a card that is shared with other processes does.

        With a budget, free bytes are at most those that the budget still allows.
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
        """Return the flat dictionary of ``torch.cuda.memory_stats``."""
        with self.locked() as allocator:
            return allocator.memory_stats()

    def empty_cache(self) -> None:
        """Return every free segment to the driver."""
        with self.locked() as allocator:
            allocator.empty_cache()
