"""The order of tests that say how much they need: largest and longest first.

Only a worker of pytest-xdist orders, and only tests that no fixture of class, module or
package scope binds to their neighbours. All workers come to the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pytest


def largest_first(
    items: list[pytest.Item],
    nbytes: Mapping[pytest.Item, int],
    seconds: Mapping[str, float],
    num_workers: int,
) -> None:
    """Move tests to the front, largest first, and among equals the longest.

    pytest-xdist hands each worker a run of consecutive tests to begin with; the tests
    are dealt out, so that no worker gets all the large ones.

    Args:
        items: All tests; changed in place.
        nbytes: What the tests that say it need, in bytes.
        seconds: How long tests took before, by name.
        num_workers: How many workers the tests are handed out to.
    """
    front = [item for item in items if item in nbytes and not _is_bound(item)]
    front.sort(key=lambda item: (-nbytes[item], -seconds.get(item.nodeid, 0.0)))
    moved = set(front)
    rest = [item for item in items if item not in moved]
    # Source: xdist.scheduler.load.LoadScheduling.schedule, the first distribution.
    chunk = max(len(items) // num_workers // 4, 2)
    if len(items) < 2 * num_workers:
        items[:] = [*front, *rest]
        return
    hands = [front[worker::num_workers][:chunk] for worker in range(num_workers)]
    dealt = {item for hand in hands for item in hand}
    left = [item for item in [*front, *rest] if item not in dealt]
    for hand in hands:
        missing = chunk - len(hand)
        hand.extend(left[:missing])
        del left[:missing]
    items[:] = [item for hand in hands for item in hand] + left


def _is_bound(item: Any) -> bool:
    """Tell whether a fixture that neighbours share would have to be made again."""
    info = getattr(item, "_fixtureinfo", None)
    definitions = getattr(info, "name2fixturedefs", {}).values()
    return any(
        each.scope in ("class", "module", "package")
        for several in definitions
        for each in several
    )
