"""Admits requests for bytes of one card, among all processes of the machine."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import AdmissionTimeoutError, BudgetError
from pytest_gpumem.tenancy.entries import Folder
from pytest_gpumem.tenancy.queue import QueuedRequest, admissible

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from pytest_gpumem.tenancy.entries import LockedFile

#: Seconds between two checks of the queue.
POLL_S: Final = 0.02


class Ledger:
    """The promised bytes of one card, which processes share through a folder.

    Args:
        folder: The folder of the entries.
        total_bytes: The card's total; it must be the same in every process.
    """

    def __init__(self, folder: str | os.PathLike[str], total_bytes: int) -> None:
        self._folder: Final = Folder(folder)
        self.total_bytes: Final = total_bytes
        self._idle_entry: LockedFile | None = None
        self._idle_bytes = 0

    def requests(self) -> dict[str, QueuedRequest]:
        """Return all requests, admitted and waiting, by name."""
        found = {}
        for path, value in self._folder.read().items():
            with suppress(TypeError):  # another version of the plugin wrote the entry
                found[path.name] = QueuedRequest(path.name, **value)
        return found

    def hold_idle(self, nbytes: int) -> None:
        """Note the bytes that this process holds between its tests.

        The process's later requests are smaller by these bytes: a test that needs 6 GiB
        may use the 2 GiB of a model that a fixture has loaded before.
        """
        nbytes = min(max(nbytes, 0), self.total_bytes)
        if nbytes == self._idle_bytes:
            return
        request = {"nbytes": nbytes, "since": 0.0, "is_admitted": True}
        value = {**request, "is_idle": True}
        with self._folder.mutex():
            if self._idle_entry is None:
                self._idle_entry = self._folder.add(value)
            elif nbytes:
                self._idle_entry.write(value)
            else:
                self._idle_entry.close()
                self._idle_entry = None
        self._idle_bytes = nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes promised at present."""
        return sum(each.nbytes for each in self.requests().values() if each.is_admitted)

    @contextmanager
    def admitted(
        self,
        nbytes: int,
        *,
        is_exclusive: bool = False,
        is_share: bool = False,
        timeout_s: float | None = None,
        on_wait: Callable[[int], None] = lambda _held: None,
    ) -> Iterator[float]:
        """Wait until bytes of the card are free, and hold them for a block.

        Args:
            nbytes: Bytes to hold, including those of ``hold_idle``.
            is_exclusive: Whether no other request may hold bytes of the card.
            is_share: Whether fewer bytes are enough if other processes hold bytes
                between their tests, such as a context, which stay until they end.
            timeout_s: The longest wait in seconds; None means no limit.
            on_wait: Called once if there is a wait, with the bytes that others hold.

        Yields:
            The seconds of the wait.

        Raises:
            BudgetError: The card's total is smaller than ``nbytes``.
            AdmissionTimeoutError: The wait was longer than ``timeout_s``.
        """
        if not 0 <= nbytes <= self.total_bytes:
            raise BudgetError(
                f"{nbytes} bytes of a card: accepted are 0 to {self.total_bytes}, the "
                "card's total",
                value=nbytes,
            )
        # The monotonic clock is the same for all processes of a machine.
        start = time.monotonic()
        request: dict[str, Any] = {
            "nbytes": max(nbytes - self._idle_bytes, 0),
            "since": start,
            "is_exclusive": is_exclusive,
        }
        entry = self._folder.add(request)
        try:
            has_told = False
            while True:
                now = time.monotonic()
                with self._folder.mutex():
                    requests = self.requests()
                    if is_share:
                        room = self.total_bytes - _idle_bytes(requests)
                        request["nbytes"] = min(request["nbytes"], max(room, 0))
                        own = QueuedRequest(entry.path.name, **request)
                        requests[entry.path.name] = own
                    names = admissible(
                        requests.values(), total_bytes=self.total_bytes, now=now
                    )
                    if entry.path.name in names:
                        entry.write({**request, "is_admitted": True})
                        break
                holders = [each for each in requests.values() if each.is_admitted]
                held = sum(each.nbytes for each in holders)
                if timeout_s is not None and now - start >= timeout_s:
                    raise AdmissionTimeoutError(
                        f"waited {timeout_s:g} s for {nbytes} bytes of a card of "
                        f"{self.total_bytes}: {held} are held by {_names(holders)}; "
                        "give a longer timeout, or ask for less"
                    )
                if not has_told:
                    has_told = True
                    on_wait(held)
                time.sleep(POLL_S)
            yield time.monotonic() - start
        finally:
            with self._folder.mutex():
                entry.close()


def _idle_bytes(requests: Mapping[str, QueuedRequest]) -> int:
    return sum(each.nbytes for each in requests.values() if each.is_idle)


def _names(requests: list[QueuedRequest]) -> str:
    """Return the processes that made requests, in words, from the names of requests."""
    pids = sorted({int(each.name.partition("-")[0]) for each in requests})
    return f"process(es) {', '.join(map(str, pids))}" if pids else "nobody"
