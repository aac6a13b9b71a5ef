"""Expandable segments: address space into which pages are mapped when needed.

Source: ``CUDACachingAllocator.cpp``, torch 2.13: ``find_expandable_block``,
``map_block``, ``unmap_block``, ``try_allocate_expandable_block`` and the class
``ExpandableSegment``.

An expandable segment reserves more addresses than the card has bytes. Its blocks are
allocated, free or unmapped. If no free block can serve a request, whole pages are
mapped at the lowest range of addresses that is long enough. A cache flush unmaps the
pages that free blocks cover entirely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pytest_gpumem.allocator.blocks import Block, Segment

if TYPE_CHECKING:
    from pytest_gpumem.allocator.heap import Heap
    from pytest_gpumem.allocator.pools import Pool


class ExpandableSegment(Segment):
    """The address space of one pool and stream.

    Attributes:
        page_bytes: Bytes that are mapped at once: 2 MiB in the small pool; in the large
            pool, the size of a large segment.
    """

    __slots__ = ("page_bytes",)

    is_expandable: ClassVar[bool] = True

    def __init__(
        self,
        address: int,
        size: int,
        number: int,
        stream: int,
        pool: Pool,
        *,
        page_bytes: int,
    ) -> None:
        super().__init__(address, size, number, stream, pool)
        self.page_bytes = page_bytes
        self.first.is_mapped = False


def reach(block: Block) -> int:
    """Return a free block's bytes together with the unmapped space directly after it."""
    following = block.next
    if following is None or following.is_mapped:
        return block.size
    return block.size + following.size


def take_mapped(heap: Heap, pool: Pool, size: int, stream: int) -> Block | None:
    """Map pages until a block has ``size`` bytes, and take the block out of its pool.

    If a later part of the request fails, the pages of its earlier parts stay mapped.

    Args:
        heap: The heap that makes the request.
        pool: The pool of the request.
        size: The rounded bytes of the request.
        stream: The stream of the request.

    Returns:
        The block, of at least ``size`` bytes; None if the driver has no page left.
    """
    block = _find(heap, pool, size, stream)
    if not block.is_mapped and not _map(heap, pool, block, min(block.size, size)):
        return None
    while block.size < size:
        following = block.next
        if following is None:
            return None  # the request is larger than the address space
        missing = min(size - block.size, following.size)
        if not _map(heap, pool, following, missing):
            return None
        block = following  # it has absorbed the previous block
    pool.remove(block)
    return block


def _find(heap: Heap, pool: Pool, size: int, stream: int) -> Block:
    """Return the first block of the lowest large enough run of free and unmapped blocks."""
    unmapped = pool.unmapped.get(stream)
    for _address, block in () if unmapped is None else unmapped:
        start: Block = block
        if start.previous is not None and start.previous.is_idle:
            start = start.previous
        nbytes = 0
        following: Block | None = start
        while nbytes < size and following is not None and following.is_idle:
            nbytes += following.size
            following = following.next
        if nbytes >= size:
            return start
    return _reserve(heap, pool, stream)


def _reserve(heap: Heap, pool: Pool, stream: int) -> Block:
    """Reserve address space for 9/8 of the card, in whole pages."""
    total = heap.driver.total_bytes
    page_bytes = heap.page_bytes(pool)
    nbytes = -(-(total + total // 8) // page_bytes) * page_bytes
    segment = ExpandableSegment(
        heap.driver.reserve(nbytes),
        nbytes,
        heap.next_number(),
        stream,
        pool,
        page_bytes=page_bytes,
    )
    heap.keep(segment)
    pool.insert_unmapped(segment.first)
    return segment.first


def _map(heap: Heap, pool: Pool, block: Block, nbytes: int) -> bool:
    """Map the first ``nbytes`` bytes of an unmapped block, rounded up to pages.

    The block becomes free and absorbs free neighbours.

    Returns:
        Whether the driver had enough pages. If it had not, nothing is changed.
    """
    segment = _segment_of(block)
    count = -(-nbytes // segment.page_bytes)
    if not heap.driver.map_pages(count, segment.page_bytes):
        return False
    mapped = count * segment.page_bytes
    address = block.address
    pool.remove_unmapped(block)
    block.is_mapped = True
    if mapped < block.size:
        rest = block.cut_back(mapped)
        rest.is_mapped = False
        pool.insert_unmapped(rest)
    for other in (block.previous, block.next):
        if other is not None and other.is_mapped and other.is_idle:
            pool.remove(other)
            block.absorb(other)
    pool.insert(block)
    stats = heap.stats
    heap.count_reserved(pool, mapped)
    stats.num_device_alloc += 1
    if heap.trace is not None:
        heap.trace("segment_map", address, mapped, segment.stream, pool.owner, segment)
    return True


def unmap(heap: Heap, pool: Pool, block: Block) -> None:
    """Return the pages that a free block covers entirely to the driver.

    A page that the block covers only partly stays mapped, and the covered part stays
    free. If the whole address space is unmapped afterwards, it is released as well.

    Args:
        heap: The heap that the block belongs to.
        pool: The pool that holds the block.
        block: A free block of an expandable segment.
    """
    segment = _segment_of(block)
    page_bytes = segment.page_bytes
    first = -(-(block.address - segment.address) // page_bytes)
    last = (block.address + block.size - segment.address) // page_bytes
    if first >= last:
        return
    pool.remove(block)
    start = segment.address + first * page_bytes
    nbytes = (last - first) * page_bytes
    heap.driver.unmap_pages(last - first, page_bytes)
    if start > block.address:
        pool.insert(block.cut_front(start - block.address))
    if block.size > nbytes:
        pool.insert(block.cut_back(nbytes))
    block.is_mapped = False
    for other in (block.previous, block.next):
        if other is not None and not other.is_mapped:
            pool.remove_unmapped(other)
            block.absorb(other)
    stats = heap.stats
    heap.count_reserved(pool, -nbytes)
    stats.num_device_free += 1
    if heap.trace is not None:
        heap.trace("segment_unmap", start, nbytes, segment.stream, pool.owner, segment)
    if block.is_split:
        pool.insert_unmapped(block)
    else:
        heap.forget(segment)
        heap.driver.unreserve(segment.size)


def _segment_of(block: Block) -> ExpandableSegment:
    segment = block.segment
    assert isinstance(segment, ExpandableSegment), "callers look first"  # noqa: S101
    return segment
