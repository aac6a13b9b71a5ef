"""Who else holds bytes of a card: other processes, real or pretended."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tenants:
    """Other processes on one card, as a simulated driver asks for them.

    Append one to ``Driver.tenants``; several add up. This base has nobody in it.
    """

    def others(self) -> Sequence[tuple[int, int]]:
        """Return pid and bytes of every other process that holds any."""
        return ()

    def changing(self) -> AbstractContextManager[None]:
        """Return a block in which no other process takes or gives bytes."""
        return nullcontext()

    def hold(self, nbytes: int) -> None:
        """Note what this process holds now; called inside ``changing``."""


class FixedTenant(Tenants):
    """One pretended process, whose bytes may be changed at any moment.

    Attributes:
        pid: What the card calls it.
        nbytes: What it holds.
    """

    def __init__(self, pid: int, nbytes: int) -> None:
        self.pid = pid
        self.nbytes = nbytes

    def others(self) -> Sequence[tuple[int, int]]:
        """Return the one process, while it holds bytes."""
        return ((self.pid, self.nbytes),) if self.nbytes else ()
