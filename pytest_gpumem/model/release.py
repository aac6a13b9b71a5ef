"""When and which free segments go back to the driver.

Source: ``CUDACachingAllocator.cpp``, ``release_cached_blocks``,
``release_available_cached_blocks`` and ``garbage_collect_cached_blocks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.model.allocator import CachingAllocator
    from pytest_gpumem.model.pools import Pool


def release_cached(allocator: CachingAllocator) -> None:
    """Wait for every stream, then give every free segment back: the flush."""
    allocator.stats.num_sync_all_streams += 1
    allocator.process_events(wait=True)
    for pool in (allocator.large_pool, allocator.small_pool):
        for block in pool.blocks():
            if not block.is_split:
                allocator.release(block)


def release_available(
    allocator: CachingAllocator, pool: Pool, size: int, stream: int
) -> bool:
    """Give back oversize blocks of a stream until a request would fit.

    Args:
        allocator: Whose blocks.
        pool: The pool of the request.
        size: Its rounded bytes.
        stream: Its stream.

    Returns:
        Whether enough was given back.
    """
    limit = allocator.config.max_split_size
    need = max(size, limit)
    free = pool.of(stream)
    found = free.first_from((need,))
    if found is not None:
        allocator.release(found[3])
        return True
    released = 0
    for key in reversed(list(free)):
        if released >= need or key[0] < limit:
            break
        released += key[0]
        allocator.release(key[3])
    return released >= need


def collect_garbage(allocator: CachingAllocator, limit_bytes: int) -> None:
    """Give back the large blocks that were unused the longest.

    Args:
        allocator: Whose blocks.
        limit_bytes: The limit that the threshold is a share of.
    """
    threshold = int(allocator.config.gc_threshold * limit_bytes)
    target = allocator.reserved_bytes - threshold
    if target <= 0:
        return
    pool = allocator.large_pool
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
            if age >= average:
                has_freed = True
                reclaimed += block.size
                total_age -= age
                allocator.release(block)
            else:
                kept.append(block)
        blocks = kept
