"""Pools of free blocks, and the error when none is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.model.freelist import FreeList

if TYPE_CHECKING:
    from pytest_gpumem.model.blocks import Block


class OutOfMemory(Exception):  # noqa: N818  # torch's class is called so
    """A request that the card cannot serve.

    Attributes:
        nbytes: Bytes asked for.
        segment_bytes: Bytes of the segment that the driver refused.
        device_index: The card.
    """

    def __init__(
        self, message: str, *, nbytes: int, segment_bytes: int, device_index: int
    ) -> None:
        super().__init__(message)
        self.nbytes = nbytes
        self.segment_bytes = segment_bytes
        self.device_index = device_index

    @property
    def message(self) -> str:
        """The text of ``torch.OutOfMemoryError``."""
        return str(self)


class Pool:
    """The free blocks of one size class, by stream."""

    __slots__ = ("clock", "free", "is_small")

    def __init__(self, *, is_small: bool) -> None:
        self.is_small = is_small
        self.free: dict[int, FreeList] = {}
        self.clock = 0

    def of(self, stream: int) -> FreeList:
        """Return a stream's free blocks."""
        found = self.free.get(stream)
        if found is None:
            found = self.free[stream] = FreeList()
        return found

    def blocks(self) -> list[Block]:
        """Return every free block in the pool's order: by stream, then best fit."""
        return [key[3] for stream in sorted(self.free) for key in self.free[stream]]
