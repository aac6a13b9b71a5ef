"""Finds, splits, allocates, merges and counts the allocator's blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpumem.allocator.blocks import (
    MIN_BLOCK_SIZE,
    SMALL_BUFFER,
    SMALL_SIZE,
    Block,
    Segment,
)
from pytest_gpumem.allocator.config import UNLIMITED
from pytest_gpumem.allocator.expandable import reach
from pytest_gpumem.allocator.figures import Figures
from pytest_gpumem.allocator.pools import DEFAULT, Pool
from pytest_gpumem.allocator.snapshot import snapshot
from pytest_gpumem.allocator.stats import Statistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.allocator.config import AllocatorConfig
    from pytest_gpumem.allocator.driver import Driver
    from pytest_gpumem.allocator.freelist import FreeList
    from pytest_gpumem.allocator.pools import PoolId

    Trace = Callable[[str, int, int, int, PoolId, Block | Segment | None], None]


class Heap(Figures):
    """The blocks of one card in two pools, and their statistics.

    Args:
        driver: The card's memory.
        config: The allocator's settings.
        device_index: The card's index.

    Attributes:
        stats: The allocator's statistics.
        trace: If set, a function that is called with action, address, size, stream and
            pool of every change, and with the block or segment that changes (a failed
            request has none). Action names and sizes are those of torch's memory
            history.
    """

    def __init__(
        self, driver: Driver, *, config: AllocatorConfig, device_index: int
    ) -> None:
        self.config = config
        self.driver = driver
        self.device_index = device_index
        self.stats = Statistics()
        self.trace: Trace | None = None
        self.small_pool = Pool(is_small=True)
        self.large_pool = Pool(is_small=False)
        self._segments: dict[int, Segment] = {}
        self._num_segments = 0

    # -- segments -----------------------------------------------------------------------

    def new_segment(self, pool: Pool, nbytes: int, stream: int) -> Block | None:
        """Take a segment from the driver and return its only block, or None."""
        address = self.driver.malloc(nbytes)
        if address is None:
            return None
        segment = Segment(address, nbytes, self.next_number(), stream, pool)
        self.keep(segment)
        stats = self.stats
        stats.segment.add(pool.is_small, 1)
        self.count_reserved(pool, nbytes)
        stats.num_device_alloc += 1
        if nbytes >= self.config.max_split_size:
            stats.oversize_segments.increase(1)
        if self.trace is not None:
            self.trace("segment_alloc", address, nbytes, stream, pool.owner, segment)
        return segment.first

    def count_reserved(self, pool: Pool, nbytes: int) -> None:
        """Add bytes, positive or negative, to those held from the driver for a pool."""
        self.stats.reserved_bytes.add(pool.is_small, nbytes)
        if pool.owner != DEFAULT:
            self.stats.reserved_by(pool.owner).add(pool.is_small, nbytes)

    def page_bytes(self, pool: Pool) -> int:
        """Return the bytes that an expandable segment of a pool maps at once."""
        return SMALL_BUFFER if pool.is_small else self.config.large_segment_size

    def next_number(self) -> int:
        """Return the sequence number for a new segment."""
        self._num_segments += 1
        return self._num_segments

    def keep(self, segment: Segment) -> None:
        """Record a new segment."""
        self._segments[segment.address] = segment

    def forget(self, segment: Segment) -> None:
        """Remove the record of a segment that was released."""
        del self._segments[segment.address]

    def segments(self) -> list[Segment]:
        """Return every segment, sorted by address."""
        return [self._segments[address] for address in sorted(self._segments)]

    # -- blocks -------------------------------------------------------------------------

    def take_free(self, pool: Pool, size: int, stream: int) -> Block | None:
        """Take the best-fitting free block of a stream out of its pool."""
        free = pool.free.get(stream)
        found = None if free is None else free.first_from((size,))
        if free is None or found is None:
            return None
        block: Block | None = found[3]
        if block is not None and block.segment.is_expandable:
            block = self._best_expandable(free, size)
        if block is None:
            return None
        limit = self.config.max_split_size
        if size < limit <= block.size:
            return None
        if size >= limit and block.size >= size + self.config.max_non_split_rounding:
            return None
        free.remove(found if block is found[3] else block.key)
        return block

    def _best_expandable(self, free: FreeList, size: int) -> Block | None:
        """Return the best fit if it is in an expandable segment.

        A free block at the end of the mapped pages counts with the size to which it can
        grow, so that a block that fits more tightly is preferred.
        """
        blocks = (key[3] for key in free.iterate_from((size,)))
        if not self.config.expandable_segments:
            return next((b for b in blocks if not b.segment.is_expandable), None)
        best: Block = next(blocks)
        for block in blocks:
            if not best.segment.is_expandable or reach(block) >= reach(best):
                break
            best = block
        return best

    def _should_split(self, block: Block, pool: Pool, size: int) -> bool:
        rest = block.size - size if pool.splits else 0
        if pool.is_small or self.config.expandable_segments:
            return rest >= MIN_BLOCK_SIZE
        return size < self.config.max_split_size and rest > SMALL_SIZE

    def hand_out(self, block: Block, size: int, nbytes: int) -> Block:
        """Split a block to the wanted size and count it as allocated."""
        stats = self.stats
        pool = block.segment.pool
        is_small = pool.is_small
        was_split = block.previous is not None or block.next is not None
        # Free parts of an expandable segment do not count as inactive split blocks, because
        # their pages can be unmapped.
        counts = not block.segment.is_expandable
        if self._should_split(block, pool, size):
            rest = block
            block = rest.cut_front(size)
            pool.insert(rest)
            if counts and was_split:
                stats.inactive_split_bytes.add(is_small, -size)
            elif counts:
                stats.inactive_split_bytes.add(is_small, rest.size)
                stats.inactive_split.add(is_small, 1)
        elif counts and was_split:
            stats.inactive_split_bytes.add(is_small, -block.size)
            stats.inactive_split.add(is_small, -1)
        block.is_allocated = True
        block.requested = nbytes
        block.frames = None
        size = block.size
        stats.allocation.add(is_small, 1)
        stats.allocated_bytes.add(is_small, size)
        if stats.active is not stats.allocation:
            stats.active.add(is_small, 1)
            stats.active_bytes.add(is_small, size)
        stats.requested_bytes.add(is_small, nbytes)
        if size >= self.config.max_split_size:
            stats.oversize_allocations.increase(1)
        if self.trace is not None:
            self._record("alloc", block)
        return block

    def put_back(self, block: Block) -> None:
        """Merge a block with free neighbours and put it into its pool."""
        stats = self.stats
        segment = block.segment
        is_small = segment.is_small
        pool = segment.pool
        free = pool.of(segment.stream)
        freed, requested = block.size, block.requested
        if self.trace is not None:
            self._record("free_completed", block)
        count = nbytes = 0
        for other in (block.previous, block.next):
            if (
                other is None
                or other.is_allocated
                or other.num_events
                or other.streams
                or not other.is_mapped
            ):
                continue
            free.remove(other.key)
            count -= 1
            nbytes -= other.size
            block.absorb(other)
        block.age_base = pool.clock
        free.add(block.key)
        if block.previous is not None or block.next is not None:
            count += 1
            nbytes += block.size
        if nbytes and not segment.is_expandable:
            stats.inactive_split_bytes.add(is_small, nbytes)
            if count:
                stats.inactive_split.add(is_small, count)
        if stats.active is not stats.allocation:
            stats.active.add(is_small, -1)
            stats.active_bytes.add(is_small, -freed)
        stats.requested_bytes.add(is_small, -requested)

    def _record(self, action: str, block: Block) -> None:
        assert self.trace is not None, "unreachable: callers look first"  # noqa: S101
        segment = block.segment
        self.trace(
            action,
            block.address,
            block.requested,
            segment.stream,
            segment.pool.owner,
            block,
        )

    # -- queries ------------------------------------------------------------------------

    def memory_stats(self) -> dict[str, int]:
        """Return the flat dictionary of ``torch.cuda.memory_stats``."""
        limit = self.config.max_split_size
        return self.stats.to_dict(max_split_size=-1 if limit == UNLIMITED else limit)

    def snapshot(self, pool_id: PoolId = DEFAULT) -> list[dict[str, Any]]:
        """Return the segments of ``torch.cuda.memory_snapshot``, or of one private pool."""
        return snapshot(self, pool_id)
