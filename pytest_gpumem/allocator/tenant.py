"""Other processes, real or simulated, that hold bytes of a card."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tenants:
    """The other processes on one card, for a simulated driver.

    Append an object to ``Driver.tenants``; the bytes of several objects are added. This
    base class has no process.
    """

    def others(self) -> Sequence[tuple[int, int]]:
        """Return the process id and bytes of every other process that holds bytes."""
        return ()

    def changing(self) -> AbstractContextManager[None]:
        """Return a context manager, inside which no other process takes or frees bytes."""
        return nullcontext()

    def hold(self, nbytes: int) -> None:
        """Record the bytes that this process holds; called inside ``changing``."""


class FixedTenant(Tenants):
    """One simulated process; its bytes may be changed at any time.

    Attributes:
        pid: The process id.
        nbytes: Bytes that the process holds.
    """

    def __init__(self, pid: int, nbytes: int) -> None:
        self.pid = pid
        self.nbytes = nbytes

    def others(self) -> Sequence[tuple[int, int]]:
        """Return the process if it holds bytes."""
        return ((self.pid, self.nbytes),) if self.nbytes else ()
