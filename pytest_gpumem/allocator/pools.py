"""Pools of free blocks, by size class and stream: default pools and private pools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_gpumem.allocator.freelist import FreeList

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block

    #: Identifies a private pool: (0, n) if a user created it, (n, 0) if a graph did.
    PoolId = tuple[int, int]

#: The id of the default pools.
#: Source: ``MempoolId_t``, ``c10/core/CachingDeviceAllocator.h``.
DEFAULT: Final = (0, 0)


class Pool:
    """The free blocks of one size class, by stream.

    Attributes:
        is_small: Whether this is the pool of small blocks.
        owner: The id of the private pool that this pool belongs to, or ``DEFAULT``.
        splits: Whether blocks are split to the requested size.
        free: Free blocks of each stream, in the order of best fit.
        unmapped: Unmapped address space of each stream, lowest address first.
        clock: The number of searches so far, from which the age of a block is computed.
    """

    __slots__ = ("clock", "free", "is_small", "owner", "splits", "unmapped")

    def __init__(
        self, *, is_small: bool, owner: PoolId = DEFAULT, splits: bool = True
    ) -> None:
        self.is_small = is_small
        self.owner = owner
        self.splits = splits
        self.free: dict[int, FreeList] = {}
        self.unmapped: dict[int, FreeList] = {}
        self.clock = 0

    def of(self, stream: int) -> FreeList:
        """Return a stream's free blocks."""
        found = self.free.get(stream)
        if found is None:
            found = self.free[stream] = FreeList()
        return found

    def insert(self, block: Block) -> None:
        """Add a free block; its age starts at 0."""
        block.age_base = self.clock
        self.of(block.segment.stream).add(block.key)

    def remove(self, block: Block) -> None:
        """Remove a free block."""
        self.free[block.segment.stream].remove(block.key)

    def insert_unmapped(self, block: Block) -> None:
        """Add unmapped address space."""
        stream = block.segment.stream
        self.unmapped.setdefault(stream, FreeList()).add((block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        """Remove unmapped address space."""
        self.unmapped[block.segment.stream].remove((block.address, block))

    def blocks(self) -> list[Block]:
        """Return every free block, sorted by stream and then in the order of best fit."""
        return [key[3] for stream in sorted(self.free) for key in self.free[stream]]


class PrivatePool:
    """A pair of pools that serves only the requests that are routed to it.

    Attributes:
        id: The pool's id.
        small: The pool of small blocks.
        large: The pool of large blocks.
        use_count: The number of graphs, objects and routes that use the pool. At 0, its
            free segments may be returned to the driver, and the pool is removed with its
            last segment.
    """

    __slots__ = ("id", "large", "small", "use_count")

    def __init__(self, pool_id: PoolId, *, splits: bool) -> None:
        self.id = pool_id
        self.small = Pool(is_small=True, owner=pool_id, splits=splits)
        self.large = Pool(is_small=False, owner=pool_id, splits=splits)
        self.use_count = 1
