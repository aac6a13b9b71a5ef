"""Segments and blocks: what the allocator cuts the card's memory into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from pytest_gpumem.allocator.pools import Pool

#: Rounding quantum and smallest block, in bytes.
#: Source of these constants: ``c10/core/AllocatorConfig.h``, torch 2.13.
MIN_BLOCK_SIZE: Final = 512
#: Requests up to here (rounded) come from the small pool.
SMALL_SIZE: Final = 2**20
#: Segment of the small pool.
SMALL_BUFFER: Final = 2 * 2**20
#: Requests from here on get a segment of their own size.
MIN_LARGE_ALLOC: Final = 10 * 2**20
#: Rounding of such segments.
ROUND_LARGE: Final = 2 * 2**20


class Segment:
    """A range taken from the driver at once; blocks tile it.

    Attributes:
        address: Where it starts.
        size: Bytes.
        number: Counts segments from the start; older ones have lower numbers.
        pool: The pool that its free blocks are in.
        is_small: Whether that is a small pool.
        stream: The stream it was taken for.
        first: Its first block.
        is_expandable: Whether it is address space that pages are mapped into.
    """

    __slots__ = ("address", "first", "is_small", "number", "pool", "size", "stream")

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
        self.first = Block(address, size, self)


class Block:
    """A piece of a segment.

    Attributes:
        size: Bytes, a multiple of 512.
        requested: Bytes last asked for, also once it is free; 0 if never.
        address: Where it starts.
        segment: The segment it is part of.
        previous: The block before it in the segment, or None.
        next: The block after it, or None.
        is_allocated: Whether a live tensor has it.
        is_mapped: Whether there is memory behind its addresses; False only in an
            expandable segment.
        streams: Other streams that use it, or None.
        num_events: Events that must complete before it can be used again.
        age_base: The pool's clock when it was freed.
        frames: Whatever the caller attaches, for snapshots.
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
        """Whether the segment has other blocks."""
        return self.previous is not None or self.next is not None

    @property
    def is_idle(self) -> bool:
        """Whether nobody uses it: neither a tensor nor another stream."""
        return not (self.is_allocated or self.num_events or self.streams)

    @property
    def key(self) -> tuple[int, int, int, Block]:
        """Best fit's order within a stream: size, age of the segment, address.

        Source: observed of torch 2.13 under drivers that use addresses again.
        """
        return (self.size, self.segment.number, self.address, self)

    def cut_front(self, nbytes: int) -> Block:
        """Make the first ``nbytes`` bytes a block of their own and return it."""
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
        """Make all but the first ``nbytes`` bytes a block of its own and return it."""
        back = Block(self.address + nbytes, self.size - nbytes, self.segment)
        back.previous = self
        back.next = self.next
        if back.next is not None:
            back.next.previous = back
        self.next = back
        self.size = nbytes
        return back

    def absorb(self, other: Block) -> None:
        """Make a neighbour part of this block; ``other`` is a block no more."""
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
    """Return the block size that a request needs.

    Args:
        nbytes: Bytes asked for, at least 1.
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
