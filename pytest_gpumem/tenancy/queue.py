"""Chooses the waiting requests that may start: the largest first, but with a time limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Seconds of waiting after which no later request may start before a request.
PATIENCE_S: Final = 10.0
#: Seconds of waiting after which no later request may start before a request for the whole
#: card, which waits until all others have ended.
PATIENCE_ALONE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class QueuedRequest:
    """A request for bytes of a card.

    Attributes:
        name: Distinct for each request.
        nbytes: Bytes; at most the card's total, which the caller checks.
        since: When it began to wait, in seconds.
        is_exclusive: Whether no other request may hold bytes of the card.
        is_admitted: Whether it holds its bytes already.
        is_idle: Whether its bytes are those that a process holds between its tests.
    """

    name: str
    nbytes: int
    since: float
    is_exclusive: bool = False
    is_admitted: bool = False
    is_idle: bool = False

    def is_patient(self, now: float) -> bool:
        """Tell whether later requests may still start before it."""
        patience = PATIENCE_ALONE_S if self.is_exclusive else PATIENCE_S
        return now - self.since < patience


def admissible(
    requests: Iterable[QueuedRequest], *, total_bytes: int, now: float
) -> list[str]:
    """Return the names of the requests that may start now.

    Requests that have waited long come first, the oldest of them at the front. If one of
    them does not fit, no request behind it starts. The other requests are sorted by size,
    then by age; a request that fits may start before a larger one that does not.
    """
    everyone = list(requests)
    held = [each for each in everyone if each.is_admitted]
    waiting = [each for each in everyone if not each.is_admitted]
    free = total_bytes - sum(each.nbytes for each in held)
    count = sum(not each.is_idle for each in held)
    if any(each.is_exclusive for each in held):
        return []
    chosen = []
    for each in sorted(waiting, key=lambda one: _rank(one, now)):
        fits = not count if each.is_exclusive else each.nbytes <= free
        if fits:
            chosen.append(each.name)
            free -= each.nbytes
            count += 1
            if each.is_exclusive:
                break
        elif not each.is_patient(now):
            break
    return chosen


def _rank(request: QueuedRequest, now: float) -> tuple[float, ...]:
    if not request.is_patient(now):
        return (0, request.since)
    size = 0 if request.is_exclusive else -request.nbytes
    return (1, not request.is_exclusive, size, request.since)
