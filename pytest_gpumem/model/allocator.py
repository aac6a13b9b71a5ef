"""A model of PyTorch's CUDA caching allocator, exact to the byte.

Source: ``c10/cuda/CUDACachingAllocator.cpp`` of torch 2.13 for every rule here, checked
against recordings of that allocator in ``tests/recordings/traces``.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from pytest_gpumem.model.blocks import (
    SMALL_SIZE,
    Block,
    Segment,
    round_size,
    segment_size,
)
from pytest_gpumem.model.config import UNLIMITED, AllocatorConfig
from pytest_gpumem.model.oom_text import MAX_REQUEST, TOO_LARGE, ProcessMemory, oom_text
from pytest_gpumem.model.pools import OutOfMemory, Pool
from pytest_gpumem.model.release import (
    collect_garbage,
    release_available,
    release_cached,
)
from pytest_gpumem.model.stats import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.model.driver import Driver


class CachingAllocator:
    """The caching allocator of one card.

    Args:
        driver: The card's memory.
        config: The settings.
        device_index: The card's index, for texts.
        processes: Who holds what of the card, for the text of an OOM; by default this
            process with what the allocator holds.

    Attributes:
        stats: The statistics.
        on_oom: Observers, called with card, segment bytes, limit and free bytes when
            a request fails.
        events_pending: While True, recorded events stay incomplete.
        trace: Where set, called with action, address, size and stream of every change.

    Limits: private pools and CUDA graphs are not modelled. Not thread-safe: the
    caller holds a lock.
    """

    def __init__(
        self,
        driver: Driver,
        *,
        config: AllocatorConfig | None = None,
        device_index: int = 0,
        processes: Callable[[], Sequence[ProcessMemory]] | None = None,
    ) -> None:
        self.config = AllocatorConfig() if config is None else config
        self.driver = driver
        self.device_index = device_index
        self.stats = Statistics()
        self.on_oom: list[Callable[[int, int, int, int], Any]] = []
        self.events_pending = False
        self.trace: Callable[[str, int, int, int], None] | None = None
        self._processes = processes or self._own_process
        self.small_pool = Pool(is_small=True)
        self.large_pool = Pool(is_small=False)
        self._segments: dict[int, Segment] = {}
        self._num_segments = 0
        self._events: dict[int, deque[Block]] = {}
        self._fraction: float | None = None
        self._limit_bytes: int | None = None
        if self.config.memory_fraction is not None:
            self.set_memory_fraction(self.config.memory_fraction)

    # -- requests -----------------------------------------------------------------------

    def malloc(self, nbytes: int, stream: int = 0, *, refuse: bool = False) -> Block:
        """Return a block of at least ``nbytes`` bytes.

        Args:
            nbytes: Bytes, at least 1.
            stream: Handle of the stream it is for.
            refuse: Whether the request shall fail as if the card were full: no cached
                block fits and the driver has nothing, before and after the flush.

        Raises:
            OutOfMemory: There is no room.
        """
        if nbytes >= MAX_REQUEST:
            raise OutOfMemory(
                TOO_LARGE,
                nbytes=nbytes,
                segment_bytes=nbytes,
                device_index=self.device_index,
            )
        if self._events:
            self.process_events()
        size = round_size(nbytes, self.config.divisions)
        pool = self.small_pool if size <= SMALL_SIZE else self.large_pool
        new_bytes = segment_size(size, self.config.large_segment_size)
        block = None if refuse else self._take_free(pool, size, stream)
        if block is None:
            block = self._take_new(pool, size, new_bytes, stream, refuse=refuse)
        if block is None:
            raise self._out_of_memory(nbytes, size, new_bytes, stream)
        return self._hand_out(block, pool, size, nbytes)

    def free(self, block: Block) -> None:
        """Take a block back; it can be used again once other streams are done."""
        stats = self.stats
        is_small = block.segment.is_small
        block.is_allocated = False
        stats.allocation.add(is_small, -1)
        stats.allocated_bytes.add(is_small, -block.size)
        if block.size >= self.config.max_split_size:
            stats.oversize_allocations.decrease(1)
        if self.trace is not None:
            self._record("free_requested", block)
        if block.streams:
            for stream in block.streams:
                self._events.setdefault(stream, deque()).append(block)
                block.num_events += 1
            block.streams = None
        else:
            self._free_block(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Note that another stream uses a block: its reuse waits for that stream."""
        if stream != block.segment.stream:
            if block.streams is None:
                block.streams = set()
            block.streams.add(stream)

    # -- taking a block -----------------------------------------------------------------

    def _take_free(self, pool: Pool, size: int, stream: int) -> Block | None:
        """Take the best-fitting free block of a stream out of its pool."""
        if self._limit_bytes is not None and self.config.gc_threshold > 0:
            pool.clock += 1
        free = pool.free.get(stream)
        found = None if free is None else free.first_from((size,))
        if free is None or found is None:
            return None
        limit = self.config.max_split_size
        if size < limit <= found[0]:
            return None
        if size >= limit and found[0] >= size + self.config.max_non_split_rounding:
            return None
        free.remove(found)
        block: Block = found[3]
        return block

    def _take_new(
        self, pool: Pool, size: int, new_bytes: int, stream: int, *, refuse: bool
    ) -> Block | None:
        """Take a new segment, giving cached ones back where that helps."""
        if self._limit_bytes is not None and self.config.gc_threshold > 0:
            collect_garbage(self, self._limit_bytes)
        block = self._new_segment(pool, new_bytes, stream, refuse=refuse)
        if (
            block is None
            and self.config.max_split_size != UNLIMITED
            and release_available(self, pool, size, stream)
        ):
            block = self._new_segment(pool, new_bytes, stream, refuse=refuse)
        if block is None:
            release_cached(self)
            self.stats.num_alloc_retries += 1
            block = self._new_segment(pool, new_bytes, stream, refuse=refuse)
        return block

    def _new_segment(
        self, pool: Pool, nbytes: int, stream: int, *, refuse: bool
    ) -> Block | None:
        stats = self.stats
        reserved = stats.reserved_bytes.all.current
        if self._limit_bytes is not None and reserved + nbytes > self._limit_bytes:
            return None
        if refuse:
            self.driver.refuse(nbytes)
            return None
        address = self.driver.malloc(nbytes)
        if address is None:
            return None
        self._num_segments += 1
        segment = Segment(
            address, nbytes, self._num_segments, stream, is_small=pool.is_small
        )
        segment.first = Block(address, nbytes, segment)
        self._segments[address] = segment
        stats.segment.add(pool.is_small, 1)
        stats.reserved_bytes.add(pool.is_small, nbytes)
        stats.num_device_alloc += 1
        if nbytes >= self.config.max_split_size:
            stats.oversize_segments.increase(1)
        if self.trace is not None:
            self.trace("segment_alloc", address, nbytes, stream)
        return segment.first

    def _should_split(self, block: Block, pool: Pool, size: int) -> bool:
        rest = block.size - size
        if pool.is_small:
            return rest >= 512  # noqa: PLR2004  # MIN_BLOCK_SIZE
        return size < self.config.max_split_size and rest > SMALL_SIZE

    def _hand_out(self, block: Block, pool: Pool, size: int, nbytes: int) -> Block:
        """Cut a block to size and count it as allocated."""
        stats = self.stats
        is_small = pool.is_small
        was_split = block.previous is not None or block.next is not None
        if self._should_split(block, pool, size):
            rest = block
            block = Block(rest.address, size, rest.segment)
            block.previous = rest.previous
            if block.previous is not None:
                block.previous.next = block
            else:
                rest.segment.first = block
            block.next = rest
            rest.previous = block
            rest.address += size
            rest.size -= size
            pool.of(rest.segment.stream).add(rest.key)
            if was_split:
                stats.inactive_split_bytes.add(is_small, -size)
            else:
                stats.inactive_split_bytes.add(is_small, rest.size)
                stats.inactive_split.add(is_small, 1)
        elif was_split:
            stats.inactive_split_bytes.add(is_small, -block.size)
            stats.inactive_split.add(is_small, -1)
        block.is_allocated = True
        block.requested = nbytes
        size = block.size
        stats.allocation.add(is_small, 1)
        stats.allocated_bytes.add(is_small, size)
        stats.active.add(is_small, 1)
        stats.active_bytes.add(is_small, size)
        stats.requested_bytes.add(is_small, nbytes)
        if size >= self.config.max_split_size:
            stats.oversize_allocations.increase(1)
        if self.trace is not None:
            self._record("alloc", block)
        return block

    # -- giving blocks back -------------------------------------------------------------

    def _free_block(self, block: Block) -> None:
        """Merge a block with free neighbours and put it into its pool."""
        stats = self.stats
        segment = block.segment
        is_small = segment.is_small
        pool = self.small_pool if is_small else self.large_pool
        free = pool.of(segment.stream)
        freed, requested = block.size, block.requested
        if self.trace is not None:
            self._record("free_completed", block)
        count = nbytes = 0
        for other in (block.previous, block.next):
            if other is None or not self._can_merge(other):
                continue
            free.remove(other.key)
            count -= 1
            nbytes -= other.size
            self._absorb(block, other)
        block.requested = 0
        block.age_base = pool.clock
        free.add(block.key)
        if block.previous is not None or block.next is not None:
            count += 1
            nbytes += block.size
        stats.inactive_split.add(is_small, count)
        stats.inactive_split_bytes.add(is_small, nbytes)
        stats.active.add(is_small, -1)
        stats.active_bytes.add(is_small, -freed)
        stats.requested_bytes.add(is_small, -requested)

    @staticmethod
    def _can_merge(block: Block) -> bool:
        return not (block.is_allocated or block.num_events or block.streams)

    @staticmethod
    def _absorb(block: Block, other: Block) -> None:
        """Make a free neighbour part of a block."""
        block.size += other.size
        if other is block.previous:
            block.address = other.address
            block.previous = other.previous
            if block.previous is not None:
                block.previous.next = block
            else:
                block.segment.first = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.previous = block

    def process_events(self, *, wait: bool = False) -> None:
        """Free the blocks whose other streams are done; ``wait`` for all of them."""
        if self.events_pending and not wait:
            return
        events, self._events = self._events, {}
        for queue in events.values():
            for block in queue:
                block.num_events -= 1
                if not block.num_events:
                    self._free_block(block)

    def release(self, block: Block) -> None:
        """Give a free, unsplit block's segment back to the driver."""
        segment = block.segment
        pool = self.small_pool if segment.is_small else self.large_pool
        pool.of(segment.stream).remove(block.key)
        del self._segments[segment.address]
        stats = self.stats
        self.driver.free(segment.address)
        stats.num_device_free += 1
        stats.segment.add(segment.is_small, -1)
        stats.reserved_bytes.add(segment.is_small, -segment.size)
        if segment.size >= self.config.max_split_size:
            stats.oversize_segments.decrease(1)
        if self.trace is not None:
            self.trace("segment_free", segment.address, segment.size, segment.stream)

    # -- the whole ----------------------------------------------------------------------

    def empty_cache(self) -> None:
        """Give every free segment back to the driver."""
        release_cached(self)

    def set_memory_fraction(self, fraction: float) -> None:
        """Limit reserved bytes to a share of the card; 1.0 means no limit.

        Raises:
            ValueError: The fraction is not between 0 and 1.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"invalid fraction: {fraction}. Please set within [0, 1].")
        self._fraction = fraction
        self._limit_bytes = (
            int(fraction * self.driver.total_bytes) if fraction < 1.0 else None
        )

    def _own_process(self) -> list[ProcessMemory]:
        return [ProcessMemory(None, self.driver.used_bytes)]

    def _out_of_memory(
        self, nbytes: int, size: int, new_bytes: int, stream: int
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
            processes=self._processes(),
        )
        if self.trace is not None:
            self.trace("oom", free, size, stream)
        stats.num_ooms += 1
        limit = total if self._limit_bytes is None else self._limit_bytes
        for observer in self.on_oom:
            observer(self.device_index, new_bytes, limit, free)
        return OutOfMemory(
            text,
            nbytes=nbytes,
            segment_bytes=new_bytes,
            device_index=self.device_index,
        )

    def _record(self, action: str, block: Block) -> None:
        assert self.trace is not None, "unreachable: callers look first"  # noqa: S101
        self.trace(action, block.address, block.requested, block.segment.stream)

    # -- questions ----------------------------------------------------------------------

    @property
    def memory_fraction(self) -> float | None:
        """The fraction last set, or None."""
        return self._fraction

    @property
    def limit_bytes(self) -> int | None:
        """The limit on reserved bytes, or None."""
        return self._limit_bytes

    @property
    def allocated_bytes(self) -> int:
        """Bytes in live blocks."""
        return self.stats.allocated_bytes.all.current

    @property
    def reserved_bytes(self) -> int:
        """Bytes held from the driver."""
        return self.stats.reserved_bytes.all.current

    @property
    def requested_bytes(self) -> int:
        """Bytes asked for and not yet usable again."""
        return self.stats.requested_bytes.all.current

    @property
    def active_bytes(self) -> int:
        """Bytes in blocks that are not usable again yet."""
        return self.stats.active_bytes.all.current

    @property
    def num_ooms(self) -> int:
        """Out-of-memory errors raised."""
        return self.stats.num_ooms

    @property
    def num_alloc_retries(self) -> int:
        """Cache flushes followed by a second try."""
        return self.stats.num_alloc_retries

    def memory_stats(self) -> dict[str, int]:
        """Return ``torch.cuda.memory_stats``'s flat dictionary."""
        limit = self.config.max_split_size
        return self.stats.to_dict(max_split_size=-1 if limit == UNLIMITED else limit)

    def reset_peak_stats(self) -> None:
        """Let every peak begin again at the current value."""
        self.stats.reset_peak()

    def reset_accumulated_stats(self) -> None:
        """Let running totals and counters begin again at 0."""
        self.stats.reset_accumulated()

    def segments(self) -> list[Segment]:
        """Return every segment, by address."""
        return [self._segments[address] for address in sorted(self._segments)]


__all__ = ["CachingAllocator", "OutOfMemory"]
