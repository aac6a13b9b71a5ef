"""Other processes that hold bytes of a card, real or simulated ones."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tenants:
    """Other processes on one card, as a simulated driver asks for them.

    Append one to ``Driver.tenants``; several add up. This base class has no process.
    """

    def others(self) -> Sequence[tuple[int, int]]:
        """Return the pid and bytes of every other process that holds bytes."""
        return ()

    def changing(self) -> AbstractContextManager[None]:
        """Return a block in which no other process takes or frees bytes."""
        return nullcontext()

    def hold(self, nbytes: int) -> None:
        """Note the bytes that this process holds now; called inside ``changing``."""


class FixedTenant(Tenants):
    """One simulated process, whose bytes may be changed at any moment.

    Attributes:
        pid: Its process id on the card.
        nbytes: Its bytes.
    """

    def __init__(self, pid: int, nbytes: int) -> None:
        self.pid = pid
        self.nbytes = nbytes

    def others(self) -> Sequence[tuple[int, int]]:
        """Return the one process, while it holds bytes."""
        return ((self.pid, self.nbytes),) if self.nbytes else ()
