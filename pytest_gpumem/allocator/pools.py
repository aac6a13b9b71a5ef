"""Pools of free blocks, by size class and stream: the default ones and private ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_gpumem.allocator.freelist import FreeList

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block

    #: What tells pools apart: (0, n) for those that users make, (n, 0) for graphs'.
    PoolId = tuple[int, int]

#: The id of what is no private pool. Source: ``MempoolId_t``, ``c10/core/CachingDeviceAllocator.h``.
DEFAULT: Final = (0, 0)


class Pool:
    """The free blocks of one size class, by stream.

    Attributes:
        is_small: Whether it is the small pool.
        owner: The id of the private pool that it is half of; else the default's.
        splits: Whether blocks are cut to size.
        free: Free blocks of each stream, best fit first.
        unmapped: Address space without memory of each stream, lowest first.
        clock: Counts searches, for the age of blocks.
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
        """Put a free block in; its age begins now."""
        block.age_base = self.clock
        self.of(block.segment.stream).add(block.key)

    def remove(self, block: Block) -> None:
        """Take a free block out."""
        self.free[block.segment.stream].remove(block.key)

    def insert_unmapped(self, block: Block) -> None:
        """Put address space without memory in."""
        stream = block.segment.stream
        self.unmapped.setdefault(stream, FreeList()).add((block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        """Take address space without memory out."""
        self.unmapped[block.segment.stream].remove((block.address, block))

    def blocks(self) -> list[Block]:
        """Return every free block in the pool's order: by stream, then best fit."""
        return [key[3] for stream in sorted(self.free) for key in self.free[stream]]


class PrivatePool:
    """A pair of pools that serves those requests alone that are routed to it.

    Attributes:
        id: What tells it apart.
        small: Its small pool.
        large: Its large pool.
        use_count: How many graphs, objects and routes use it. At 0 its free segments
            may go back to the driver, and with the last of them it goes.
    """

    __slots__ = ("id", "large", "small", "use_count")

    def __init__(self, pool_id: PoolId, *, splits: bool) -> None:
        self.id = pool_id
        self.small = Pool(is_small=True, owner=pool_id, splits=splits)
        self.large = Pool(is_small=False, owner=pool_id, splits=splits)
        self.use_count = 1
