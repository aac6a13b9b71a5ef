"""Shares one simulated card among several processes: each sees the others' bytes."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.allocator.tenant import Tenants
from pytest_gpumem.tenancy.entries import Folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from pytest_gpumem.tenancy.entries import LockedFile

#: Seconds that a run may take, after it made its folder, to write the file that shows that
#: it is alive.
_YOUNG_S: Final = 60.0


class SharedCard(Tenants):
    """The other processes that use the same simulated card.

    Args:
        folder: The folder in which each process notes the bytes that it holds.
        sign: A file that exists while the run is alive.
    """

    def __init__(
        self, folder: str | os.PathLike[str], sign: LockedFile | None = None
    ) -> None:
        self._folder: Final = Folder(folder)
        self._sign: Final = sign
        self._entry: LockedFile | None = None
        self._pid = 0

    def others(self) -> Sequence[tuple[int, int]]:
        """Return the pid and bytes of every other process that holds bytes."""
        found = self._folder.read(without=self._own())
        return [(value["pid"], value["nbytes"]) for value in found.values()]

    def changing(self) -> AbstractContextManager[None]:
        """Return a block in which no other process takes or frees bytes."""
        return self._folder.mutex()

    def hold(self, nbytes: int) -> None:
        """Note the bytes that this process holds now."""
        entry = self._own()
        value = {"pid": os.getpid(), "nbytes": nbytes}
        if nbytes and entry is None:
            self._entry, self._pid = self._folder.add(value), os.getpid()
        elif nbytes and entry is not None:
            entry.write(value)
        elif entry is not None:
            entry.close()
            self._entry = None

    def leave(self) -> None:
        """Remove this process's entry."""
        if self._own() is not None:
            with self._folder.mutex():
                self.hold(0)
        if self._sign is not None:
            self._sign.close()

    def _own(self) -> LockedFile | None:
        """Return this process's entry; a forked child makes its own."""
        return self._entry if self._pid == os.getpid() else None


def join_cards(cards: Sequence[Any], root: str) -> list[SharedCard]:
    """Let the processes that name the same folder share simulated cards.

    Args:
        cards: Every card of the machine, also those that this process does not see; the
            bytes of a card's ``driver`` are shared.
        root: The folder.

    Returns:
        The shared cards, in the order of ``cards``.
    """
    _remove_dead_runs(Path(root))
    sign = Folder(root).add({})
    joined = []
    for card in cards:
        shared = SharedCard(os.path.join(root, f"card-{card.number}"), sign)  # noqa: PTH118  # paths of this room are text
        card.driver.tenants.append(shared)
        joined.append(shared)
    return joined


def _remove_dead_runs(root: Path) -> None:
    """Remove folders of other runs that were killed."""
    for other in root.parent.glob("run-*"):
        with suppress(OSError):
            is_old = time.time() - other.stat().st_mtime > _YOUNG_S
            if other != root and is_old and not Folder(other).read():
                shutil.rmtree(other)
