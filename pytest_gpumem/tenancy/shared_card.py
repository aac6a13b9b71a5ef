"""One simulated card shared by several processes: each sees the others' bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from pytest_gpumem.model.tenants import Tenants
from pytest_gpumem.tenancy.entries import Folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from pytest_gpumem.tenancy.entries import Entry


class SharedCard(Tenants):
    """The other processes that use the same simulated card.

    Args:
        folder: Where each process notes what it holds.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder: Final = Folder(folder)
        self._entry: Entry | None = None
        self._pid = 0

    def others(self) -> Sequence[tuple[int, int]]:
        """Return pid and bytes of every other process that holds any."""
        entry = self._own()
        own = None if entry is None else entry.path
        return [
            (value["pid"], value["nbytes"])
            for path, value in self._folder.read().items()
            if path != own
        ]

    def changing(self) -> AbstractContextManager[None]:
        """Return a block in which no other process takes or gives bytes."""
        return self._folder.mutex()

    def hold(self, nbytes: int) -> None:
        """Note what this process holds now."""
        entry = self._own()
        value = {"pid": os.getpid(), "nbytes": nbytes}
        if nbytes and entry is None:
            self._entry, self._pid = self._folder.add(value), os.getpid()
        elif nbytes and entry is not None:
            entry.write(value)
        elif entry is not None:
            entry.close()
            self._entry = None

    def _own(self) -> Entry | None:
        """Return this process's entry; a forked child has none of its parent's."""
        return self._entry if self._pid == os.getpid() else None
