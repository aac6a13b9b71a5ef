"""Keeps the blocks that were live at the peak so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

_Block = TypeVar("_Block")


class LivePeak(Generic[_Block]):
    """The blocks of a card that were live at its peak.

    Args:
        allocated: The bytes that were allocated before the first block.

    Attributes:
        nbytes: The allocated bytes at the peak.
    """

    def __init__(self, allocated: int = 0) -> None:
        self.nbytes = allocated
        # Blocks that were allocated after the peak, and blocks live at the peak that were freed.
        self._since: set[int] = set()
        self._gone: list[_Block] = []

    def gain(self, address: int, allocated: int) -> None:
        """Note a new block, after which so many bytes are allocated."""
        if allocated > self.nbytes:
            self.nbytes = allocated
            self._since.clear()
            self._gone.clear()
        else:
            self._since.add(address)

    def lose(self, address: int, block: _Block | None) -> None:
        """Note that a block was freed; None for a block that is not known."""
        if address in self._since:
            self._since.remove(address)
        elif block is not None:
            self._gone.append(block)

    def live(self, blocks: Mapping[int, _Block]) -> list[_Block]:
        """Return the blocks that were live at the peak.

        Args:
            blocks: The blocks that are on the card now, by address.
        """
        still = [blocks[each] for each in blocks if each not in self._since]
        return [*still, *self._gone]
