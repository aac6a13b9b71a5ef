"""Segments and blocks: the pieces into which the allocator divides the card's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from pytest_gpumem.allocator.pools import Pool

#: Rounding quantum and smallest block, in bytes.
#: Source of these constants: ``c10/core/AllocatorConfig.h``, torch 2.13.
MIN_BLOCK_SIZE: Final = 512
#: Rounded requests of up to this many bytes come from the small pool.
SMALL_SIZE: Final = 2**20
#: Bytes of a segment of the small pool.
SMALL_BUFFER: Final = 2 * 2**20
#: A request of at least this many bytes gets a segment of its own size.
MIN_LARGE_ALLOC: Final = 10 * 2**20
#: Segments that have the size of their request are rounded up to a multiple of this.
ROUND_LARGE: Final = 2 * 2**20


class Segment:
    """A range of memory from one driver call; blocks cover it without gaps.

    Attributes:
        address: Address of the first byte.
        size: Length in bytes.
        number: Sequence number; an older segment has a lower number.
        pool: The pool that holds the segment's free blocks.
        is_small: Whether ``pool`` is a small pool.
        stream: The stream that requested the segment.
        first: The segment's first block.
        is_expandable: Whether the segment is address space into which pages are mapped.
        frames: Stack frames of the request that it was made for, for snapshots; or None.
    """

    __slots__ = (
        "address",
        "first",
        "frames",
        "is_small",
        "number",
        "pool",
        "size",
        "stream",
    )

    is_expandable: ClassVar[bool] = False

    def __init__(
        self, address: int, size: int, number: int, stream: int, pool: Pool
    ) -> None:
        self.address = address
        self.size = size
        self.number = number
        self.stream = stream
        self.pool = pool
        self.is_small = pool.is_small
        self.frames: Any = None
        self.first = Block(address, size, self)


class Block:
    """A piece of a segment.

    Attributes:
        size: Bytes, a multiple of 512.
        requested: Bytes of the last request that the block served, even if the block is
            free now; 0 if it served none.
        address: Address of the first byte.
        segment: The segment that contains the block.
        previous: The block before it in the segment, or None.
        next: The block after it, or None.
        is_allocated: Whether a live tensor uses the block.
        is_mapped: Whether memory is mapped at the block's addresses; False only in an
            expandable segment.
        streams: Other streams that use the block, or None.
        num_events: Events that must complete before the block can be used again.
        age_base: The pool's clock when the block was freed.
        frames: Stack frames of the request, for snapshots; or None.
    """

    __slots__ = (
        "address",
        "age_base",
        "frames",
        "is_allocated",
        "is_mapped",
        "next",
        "num_events",
        "previous",
        "requested",
        "segment",
        "size",
        "streams",
    )

    def __init__(self, address: int, size: int, segment: Segment) -> None:
        self.address = address
        self.size = size
        self.segment = segment
        self.requested = 0
        self.previous: Block | None = None
        self.next: Block | None = None
        self.is_allocated = False
        self.is_mapped = True
        self.streams: set[int] | None = None
        self.num_events = 0
        self.age_base = 0
        self.frames: Any = None

    @property
    def is_split(self) -> bool:
        """Whether the segment contains other blocks."""
        return self.previous is not None or self.next is not None

    @property
    def is_idle(self) -> bool:
        """Whether neither a tensor nor another stream uses the block."""
        return not (self.is_allocated or self.num_events or self.streams)

    @property
    def key(self) -> tuple[int, int, int, Block]:
        """The sort key of best fit within a stream: size, age of the segment, address.

        Source: observed with torch 2.13 on drivers that reuse addresses.
        """
        return (self.size, self.segment.number, self.address, self)

    def cut_front(self, nbytes: int) -> Block:
        """Split off the first ``nbytes`` bytes as a new block, and return the new block."""
        front = Block(self.address, nbytes, self.segment)
        front.previous = self.previous
        if front.previous is not None:
            front.previous.next = front
        else:
            self.segment.first = front
        front.next = self
        self.previous = front
        self.address += nbytes
        self.size -= nbytes
        return front

    def cut_back(self, nbytes: int) -> Block:
        """Split off all but the first ``nbytes`` bytes as a new block, and return it."""
        back = Block(self.address + nbytes, self.size - nbytes, self.segment)
        back.previous = self
        back.next = self.next
        if back.next is not None:
            back.next.previous = back
        self.next = back
        self.size = nbytes
        return back

    def absorb(self, other: Block) -> None:
        """Merge the neighbour ``other`` into this block, which replaces both."""
        self.size += other.size
        if other is self.previous:
            self.address = other.address
            self.previous = other.previous
            if self.previous is not None:
                self.previous.next = self
            else:
                self.segment.first = self
        else:
            self.next = other.next
            if self.next is not None:
                self.next.previous = self


def round_size(nbytes: int, divisions: tuple[int, ...]) -> int:
    """Return the size of the block that serves a request.

    Args:
        nbytes: Requested bytes, at least 1.
        divisions: ``AllocatorConfig.divisions``.

    Source: ``CUDACachingAllocator.cpp``, ``round_size`` and
    ``roundup_power2_next_division``.
    """
    if nbytes < MIN_BLOCK_SIZE:
        return MIN_BLOCK_SIZE
    index = min(max(nbytes.bit_length() - 21, 0), len(divisions) - 1)
    steps = divisions[index]
    if steps > 1 and nbytes > MIN_BLOCK_SIZE * steps:
        if not nbytes & (nbytes - 1):
            return nbytes
        power = 1 << (nbytes.bit_length() - 1)
        step = power >> (steps.bit_length() - 1)
        return 2 * power if not step else -(-nbytes // step) * step
    return -(-nbytes // MIN_BLOCK_SIZE) * MIN_BLOCK_SIZE


def segment_size(size: int, large_segment_size: int) -> int:
    """Return the bytes of a new segment for a rounded request.

    Source: ``CUDACachingAllocator.cpp``, ``get_allocation_size``.
    """
    if size <= SMALL_SIZE:
        return SMALL_BUFFER
    if size < MIN_LARGE_ALLOC:
        return large_segment_size
    return -(-size // ROUND_LARGE) * ROUND_LARGE
