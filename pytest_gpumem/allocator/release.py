"""Selects free segments and returns them to the driver.

Source: ``CUDACachingAllocator.cpp``, ``release_cached_blocks``,
``release_available_cached_blocks`` and ``garbage_collect_cached_blocks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.allocator.expandable import unmap

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.allocator.heap import Heap
    from pytest_gpumem.allocator.pools import Pool


def release(heap: Heap, pool: Pool, block: Block) -> None:
    """Return a free, unsplit block's segment to the driver."""
    segment = block.segment
    pool.remove(block)
    heap.forget(segment)
    heap.driver.free(segment.address)
    stats = heap.stats
    stats.num_device_free += 1
    stats.segment.add(segment.is_small, -1)
    heap.count_reserved(pool, -segment.size)
    if segment.size >= heap.config.max_split_size:
        stats.oversize_segments.decrease(1)
    if heap.trace is not None:
        heap.trace(
            "segment_free",
            segment.address,
            segment.size,
            segment.stream,
            pool.owner,
            segment,
        )


def release_cached(heap: Heap, *pools: Pool) -> None:
    """Return every free segment of the pools, and every page that free blocks cover."""
    for pool in pools:
        expandable = []
        for block in pool.blocks():
            if block.segment.is_expandable:
                expandable.append(block)
            elif not block.is_split:
                release(heap, pool, block)
        for block in expandable:
            unmap(heap, pool, block)


def release_available(heap: Heap, pool: Pool, size: int, stream: int) -> bool:
    """Return oversize blocks of a stream to the driver until a request fits.

    Args:
        heap: The heap that the blocks belong to.
        pool: The pool of the request.
        size: The rounded bytes of the request.
        stream: The stream of the request.

    Returns:
        Whether enough bytes were returned to the driver.
    """
    limit = heap.config.max_split_size
    need = max(size, limit)
    free = pool.of(stream)
    found = free.first_from((need,))
    if found is not None and not found[3].segment.is_expandable:
        release(heap, pool, found[3])
        return True
    released = 0
    smaller = [key[3] for key in free if key[0] < need]
    for block in reversed(smaller):
        if released >= need or block.size < limit:
            break
        if not block.segment.is_expandable:
            released += block.size
            release(heap, pool, block)
    return released >= need


def collect_garbage(heap: Heap, limit_bytes: int) -> None:
    """Return to the driver the large blocks that were unused for the longest time.

    Args:
        heap: The heap that the blocks belong to.
        limit_bytes: The limit on reserved bytes; the threshold is a share of it.
    """
    threshold = int(heap.config.gc_threshold * limit_bytes)
    target = heap.reserved_bytes - threshold
    if target <= 0:
        return
    pool = heap.large_pool
    blocks = [block for block in pool.blocks() if not block.is_split]
    total_age = sum(pool.clock - block.age_base for block in blocks)
    reclaimed = 0
    has_freed = True
    while reclaimed < target and has_freed and blocks:
        average = total_age / len(blocks)
        has_freed = False
        kept = []
        for block in blocks:
            age = pool.clock - block.age_base
            if age >= average and not block.segment.is_expandable:
                has_freed = True
                reclaimed += block.size
                total_age -= age
                release(heap, pool, block)
            else:
                kept.append(block)
        blocks = kept
