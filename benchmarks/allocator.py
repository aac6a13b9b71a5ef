"""How fast the allocator model is, and how that grows with live blocks.

Run: ``python benchmarks/allocator.py``. Times are processor times, so that other
programs on the machine disturb them little.
"""

from __future__ import annotations

import random
import time

from pytest_gpumem.allocator.caching import CachingAllocator
from pytest_gpumem.allocator.driver import Driver

EVENTS = 200_000


def measure(live: int) -> float:
    """Return events per second of a random trace with so many live blocks."""
    draw = random.Random(0)  # noqa: S311  # a repeatable trace
    allocator = CachingAllocator(Driver(2**50))
    sizes = (512, 4096, 70_000, 3 * 2**20, 12 * 2**20)
    blocks = [allocator.malloc(draw.choice(sizes)) for _ in range(live)]
    trace = [
        (draw.randrange(live), int(2 ** draw.uniform(6, 24)))
        for _ in range(EVENTS // 2)
    ]
    started_s = time.process_time()
    for index, nbytes in trace:
        allocator.free(blocks[index])
        blocks[index] = allocator.malloc(nbytes)
    return EVENTS / (time.process_time() - started_s)


def main() -> None:
    """Print the table, in Markdown."""
    print("| live blocks | events/s | time against 1,000 |\n|---|---|---|")
    first = 0.0
    for live in (10**3, 10**4, 10**5, 10**6):
        rate = measure(live)
        first = first or rate
        print(f"| {live:,} | {rate:,.0f} | {first / rate:.2f} |")


if __name__ == "__main__":
    main()
