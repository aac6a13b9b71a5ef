"""A model of PyTorch's CUDA caching allocator, exact to the byte.

Source of every rule in this module: ``c10/cuda/CUDACachingAllocator.cpp``, torch 2.13.
The model is compared with recordings of that allocator in ``tests/recordings/traces``.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.allocator.blocks import SMALL_SIZE, Block, round_size, segment_size
from pytest_gpumem.allocator.config import UNLIMITED, AllocatorConfig
from pytest_gpumem.allocator.expandable import take_mapped
from pytest_gpumem.allocator.oom_text import (
    MAX_REQUEST,
    TOO_LARGE,
    OutOfMemory,
    ProcessMemory,
    oom_text,
)
from pytest_gpumem.allocator.pools import DEFAULT
from pytest_gpumem.allocator.private_pools import PrivatePools
from pytest_gpumem.allocator.release import (
    collect_garbage,
    release_available,
    release_cached,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.allocator.driver import Driver
    from pytest_gpumem.allocator.pools import Pool, PoolId

#: Key of the blocks whose streams cannot be queried until a graph capture has ended.
_AFTER_CAPTURE: Final = -1


class CachingAllocator(PrivatePools):
    """The caching allocator of one card.

    Args:
        driver: The card's memory.
        config: The allocator's settings.
        device_index: The card's index, for messages.
        processes: Returns the memory that each process holds, for the message of an OOM;
            by default this process with the bytes that the allocator holds.

    Attributes:
        stats: The statistics.
        on_oom: Observers, called with card, segment bytes, limit and free bytes when
            a request fails.
        events_pending: While True, recorded events stay incomplete.
        on_miss: If set, a function that is called if no free block fits; it returns
            whether it has freed any.
        trace: If set, a function that is called with action, address, size, stream and
            pool of every change, and with its block or segment.
        is_serving: Whether changes are made for a request that found no free block.

    Limits: the allocator is not thread-safe, and no method may be called while another
    runs, even by a finaliser in the same thread. The caller must hold a lock, and must
    queue the blocks that are freed while a method runs.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        config: AllocatorConfig | None = None,
        device_index: int = 0,
        processes: Callable[[], Sequence[ProcessMemory]] | None = None,
    ) -> None:
        super().__init__(
            driver,
            config=AllocatorConfig() if config is None else config,
            device_index=device_index,
        )
        self.on_oom: list[Callable[[int, int, int, int], Any]] = []
        self.events_pending = False
        self.is_serving = False
        self.on_miss: Callable[[], bool] | None = None
        self._processes = processes or self._own_process
        self._events: dict[int, deque[Block]] = {}
        #: By block, the streams that began to use it during a graph capture. The graph
        #: itself orders these streams.
        self._streams_in_capture: dict[Block, set[int]] = {}
        self._fraction: float | None = None
        self._budget_bytes: int | None = None
        self._limit_bytes: int | None = None
        if self.config.memory_fraction is not None:
            self.set_memory_fraction(self.config.memory_fraction)

    # -- requests -----------------------------------------------------------------------

    def malloc(self, nbytes: int, stream: int = 0, *, refuse: bool = False) -> Block:
        """Return a block of at least ``nbytes`` bytes.

        Args:
            nbytes: Requested bytes, at least 1.
            stream: Handle of the requesting stream.
            refuse: Whether the request must fail as if the card were full: no cached block
                fits and the driver has no memory, before and after the cache is flushed.

        Raises:
            OutOfMemory: The card has no room for the request.
        """
        if nbytes >= MAX_REQUEST:
            raise OutOfMemory(
                TOO_LARGE,
                nbytes=nbytes,
                rounded_bytes=nbytes,
                segment_bytes=nbytes,
                device_index=self.device_index,
            )
        if self._events:
            self.process_events()
        size = round_size(nbytes, self.config.divisions)
        pool = self.small_pool if size <= SMALL_SIZE else self.large_pool
        if self._routes:
            pool = self.routed(pool, stream)
        if self._limit_bytes is not None and self.config.gc_threshold > 0:
            pool.clock += 1
        block = None if refuse else self.take_free(pool, size, stream)
        if block is None and not refuse and self.on_miss and self.on_miss():
            block = self.take_free(pool, size, stream)
        if block is None:
            new_bytes = segment_size(size, self.config.large_segment_size)
            block = self._take_new(pool, size, new_bytes, stream, refuse=refuse)
            if block is None:
                raise self._out_of_memory(nbytes, size, new_bytes, stream, pool)
        return self.hand_out(block, size, nbytes)

    def free(self, block: Block) -> None:
        """Free a block; it can be used again once other streams have finished with it.

        Raises:
            ValueError: The block is free already.
        """
        if not block.is_allocated:
            raise ValueError(f"block at {block.address:#x} is freed a second time")
        stats = self.stats
        is_small = block.segment.is_small
        block.is_allocated = False
        if block.streams:
            stats.separate_active()
        stats.allocation.add(is_small, -1)
        stats.allocated_bytes.add(is_small, -block.size)
        if block.size >= self.config.max_split_size:
            stats.oversize_allocations.decrease(1)
        if self.trace is not None:
            self._record("free_requested", block)
        if not block.streams:
            self.put_back(block)
        elif self._num_captures:
            self._events.setdefault(_AFTER_CAPTURE, deque()).append(block)
        else:
            self._record_events(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Record that another stream uses a block; its reuse waits for that stream."""
        if stream != block.segment.stream:
            if block.streams is None:
                block.streams = set()
            block.streams.add(stream)
            if self._num_captures:
                self._streams_in_capture.setdefault(block, set()).add(stream)

    # -- taking a block -----------------------------------------------------------------

    def _take_new(
        self, pool: Pool, size: int, new_bytes: int, stream: int, *, refuse: bool
    ) -> Block | None:
        """Take a new segment, and return cached segments to the driver if necessary."""
        self.is_serving = True
        try:
            return self._find_new(pool, size, new_bytes, stream, refuse=refuse)
        finally:
            self.is_serving = False

    def _find_new(
        self, pool: Pool, size: int, new_bytes: int, stream: int, *, refuse: bool
    ) -> Block | None:
        if self._limit_bytes is not None and self.config.gc_threshold > 0:
            collect_garbage(self, self._limit_bytes)
        block = self._new_block(pool, size, new_bytes, stream, refuse=refuse)
        if block is None and self._for_ooms and not refuse:
            block = self.take_from_others(pool, size, stream)
        if (
            block is None
            and self.config.max_split_size != UNLIMITED
            and release_available(self, pool, size, stream)
        ):
            block = self._new_block(pool, size, new_bytes, stream, refuse=refuse)
        if block is None and not self._num_captures:
            self.empty_cache()
            self.stats.num_alloc_retries += 1
            block = self._new_block(pool, size, new_bytes, stream, refuse=refuse)
        return block

    def _new_block(
        self, pool: Pool, size: int, new_bytes: int, stream: int, *, refuse: bool
    ) -> Block | None:
        """Take memory from the driver if the limit allows it."""
        limit = self._limit_bytes
        if limit is not None and self.reserved_bytes + new_bytes > limit:
            return None
        if self.config.expandable_segments:
            if refuse:
                self.driver.refuse_pages(self.page_bytes(pool))
                return None
            return take_mapped(self, pool, size, stream)
        if refuse:
            self.driver.refuse(new_bytes)
            return None
        return self.new_segment(pool, new_bytes, stream)

    # -- returning blocks ---------------------------------------------------------------

    def process_events(self, *, wait: bool = False) -> None:
        """Free the blocks that other streams have finished with.

        Args:
            wait: Whether to wait until all other streams have finished.
        """
        if self._num_captures:
            return
        for block in self._events.pop(_AFTER_CAPTURE, ()):
            streams = block.streams or set()
            streams -= self._streams_in_capture.pop(block, set())
            block.streams = streams or None
            if streams:
                self._record_events(block)
            else:
                self.put_back(block)
        if self.events_pending and not wait:
            return
        events, self._events = self._events, {}
        for queue in events.values():
            for block in queue:
                block.num_events -= 1
                if not block.num_events:
                    self.put_back(block)

    def _record_events(self, block: Block) -> None:
        """Record an event that the block waits for on each other stream that uses it."""
        for stream in block.streams or ():
            self._events.setdefault(stream, deque()).append(block)
            block.num_events += 1
        block.streams = None

    # -- the card -----------------------------------------------------------------------

    def empty_cache(self, pool_id: PoolId = DEFAULT) -> None:
        """Wait for every stream, then return every free segment to the driver.

        The free segments of a private pool are returned once the pool has no user. During
        a graph capture waiting is not allowed, and the default pools keep their segments.

        Args:
            pool_id: The private pool whose segments are returned; by default, segments of
                every pool are returned.
        """
        if pool_id != DEFAULT:
            private = self.private_pools.get(pool_id)
            if private is not None and not private.use_count:
                self.stats.num_sync_all_streams += 1
                self.process_events(wait=True)
                self.release_unused_pools(pool_id)
            return
        if not self._num_captures:
            self.stats.num_sync_all_streams += 1
            self.process_events(wait=True)
            release_cached(self, self.large_pool, self.small_pool)
        self.release_unused_pools()

    def set_memory_fraction(self, fraction: float) -> None:
        """Limit reserved bytes to a share of the card.

        1.0 means no limit. Up to torch 2.9 it is a limit, which the message of an OOM
        names.

        Raises:
            ValueError: The fraction is not between 0 and 1.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"invalid fraction: {fraction}. Please set within [0, 1].")
        self._fraction = fraction
        self._set_limit()

    def set_budget(self, budget_bytes: int | None) -> None:
        """Limit reserved bytes in addition to the fraction: the smaller limit applies.

        Args:
            budget_bytes: The limit in bytes, inclusive; None means no limit.
        """
        self._budget_bytes = budget_bytes
        self._set_limit()

    def _set_limit(self) -> None:
        total = self.driver.total_bytes
        fraction = 1.0 if self._fraction is None else self._fraction
        limits = [int(fraction * total), total]
        if self._budget_bytes is not None:
            limits.append(self._budget_bytes)
        limit = min(limits)
        names_whole = self.config.version.names_whole_fraction
        is_limit = limit < total or (names_whole and self._fraction is not None)
        self._limit_bytes = limit if is_limit else None

    def _own_process(self) -> list[ProcessMemory]:
        return [ProcessMemory(*each) for each in self.driver.processes()]

    def _out_of_memory(
        self, nbytes: int, size: int, new_bytes: int, stream: int, pool: Pool
    ) -> OutOfMemory:
        stats = self.stats
        free, total = self.driver.free_bytes, self.driver.total_bytes
        text = oom_text(
            device_index=self.device_index,
            segment_bytes=new_bytes,
            total_bytes=total,
            free_bytes=free,
            allowed_bytes=self._limit_bytes,
            allocated_bytes=stats.allocated_bytes.all.current,
            reserved_bytes=stats.reserved_bytes.all.current,
            private_bytes=self.free_in_private_pools(),
            processes=self._processes(),
            is_expandable=self.config.expandable_segments,
            version=self.config.version,
        )
        if self.trace is not None:
            self.trace("oom", free, size, stream, pool.owner, None)
        stats.num_ooms += 1
        limit = total if self._limit_bytes is None else self._limit_bytes
        for observer in self.on_oom:
            observer(self.device_index, new_bytes, limit, free)
        return OutOfMemory(
            text,
            nbytes=nbytes,
            rounded_bytes=size,
            segment_bytes=new_bytes,
            device_index=self.device_index,
        )

    # -- queries ------------------------------------------------------------------------

    @property
    def memory_fraction(self) -> float | None:
        """The fraction that was set last, or None."""
        return self._fraction

    @property
    def limit_bytes(self) -> int | None:
        """The limit on reserved bytes, or None if there is none."""
        return self._limit_bytes


__all__ = ["CachingAllocator", "OutOfMemory"]
