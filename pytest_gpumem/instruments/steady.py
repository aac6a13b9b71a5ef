"""Runs a loop, and fails if its memory grows from step to step."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Final

from pytest_gpumem.devices import allocated_bytes
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.errors import GrowthError
from pytest_gpumem.instruments.holders import blocks_on_cards, find_holders
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.devices import Device

#: The steps after the warm-up are divided into this many parts. Memory that grows steadily
#: is larger in each part than in the one before; memory that is added once is not.
_PARTS: Final = 3


def steady(
    steps: int = 9,
    *,
    warmup: int = 2,
    allowed: int | str = 0,
    device: Device | None = None,
) -> Iterator[int]:
    """Yield the number of each step; fail if the bytes on the cards grow steadily.

    A training loop or a server may keep tensors by mistake, such as a loss with its graph,
    a list of outputs or a cache. They are freed when the test ends, so a leak check at the
    end does not see them. After each step garbage is collected, and the bytes of live
    tensors are counted. The steps after the warm-up are divided into three parts. The
    loop fails if the minimum of each part is above the minimum of the part before.

    Args:
        steps: How often the body is run.
        warmup: How many of the first steps may add bytes, as optimisers and caches do.
        allowed: The bytes that each step may add, or a text such as ``"1KiB"``.
        device: The device; None means the active device.

    Yields:
        0, 1, 2, …

    Raises:
        GrowthError: The bytes grew; the message says by how much, and what holds the
            added bytes.
        SizeError: ``allowed`` is not a size.
        ValueError: Fewer than three steps come after the warm-up.
        DeviceUnavailableError: There is no active device.

    Example::

        for _step in steady(steps=12):
            train_one_batch()
    """
    if warmup < 0 or steps - warmup < _PARTS:
        raise ValueError(
            f"steps={steps!r}, warmup={warmup!r}: at least {_PARTS} steps must come after "
            f"the warm-up; give steps={max(warmup, 0) + _PARTS} or more"
        )
    allowed_bytes = parse_size(allowed, allow_zero=True)
    device = active_device() if device is None else device
    held: list[int] = []
    before: set[int] = set()
    for step in range(steps):
        if step == warmup:
            gc.collect()
            before = blocks_on_cards()
        yield step
        if step >= warmup:
            gc.collect()
            held.append(allocated_bytes(device))
    grown = _growth(held)
    if grown > allowed_bytes:
        lines = [
            f"memory grows by {format_size(grown)} ({grown} bytes) in each step after "
            f"the first {warmup}, from {format_size(held[0])} to "
            f"{format_size(held[-1])} in {len(held)} steps; allowed are "
            f"{format_size(allowed_bytes)}"
        ]
        holders = find_holders(device, before)
        if holders:
            lines.append("the largest that were added, and who holds them:")
            lines += [f"  {each}" for each in holders]
        raise GrowthError("\n".join(lines))


def _growth(held: Sequence[int]) -> int:
    """Return the bytes that each step adds, rounded up; 0 if some part adds none."""
    length = len(held) // _PARTS
    counted = held[len(held) % _PARTS :]
    least = [
        min(counted[start : start + length]) for start in range(0, len(counted), length)
    ]
    added = [least[1] - least[0], least[2] - least[1]]
    if min(added) <= 0:
        return 0
    return -(-sum(added) // (2 * length))
