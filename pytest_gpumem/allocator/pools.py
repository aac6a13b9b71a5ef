"""Pools of free blocks, by size class and stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.allocator.freelist import FreeList

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block


class Pool:
    """The free blocks of one size class, by stream.

    Attributes:
        is_small: Whether it is the small pool.
        free: Free blocks of each stream, best fit first.
        unmapped: Address space without memory of each stream, lowest first.
        clock: Counts searches, for the age of blocks.
    """

    __slots__ = ("clock", "free", "is_small", "unmapped")

    def __init__(self, *, is_small: bool) -> None:
        self.is_small = is_small
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
