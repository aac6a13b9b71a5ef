"""A budget on a card, for a block of code."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.inheritance import pass_budget_on
from pytest_gpumem.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices import Device


@contextmanager
def vram_budget(
    size: int | str, *, device_index: int = 0, device: Device | None = None
) -> Iterator[int]:
    """Let a block hold at most ``size`` bytes of a card.

    The cap is the allocator's own (``set_per_process_memory_fraction``): reserved
    bytes, inclusive. Functions that report free memory agree with it; the card's total
    does not change. If several budgets are active (of blocks, fixtures, the test and the
    run), the smallest holds. A block's budget ends with the block, also after an error,
    and blocks may end in any order.

    Args:
        size: Bytes, or a text such as ``"1.5GiB"`` or ``"50%"`` of the card.
        device_index: The card.
        device: The device; None means the active device.

    Yields:
        The budget in force, in bytes.

    Raises:
        SizeError: The text is not a size.
        BudgetError: The budget is not between 1 byte and the card's total.
        DeviceUnavailableError: There is no active device.

    Example::

        with vram_budget("1GiB"):
            model = load()
    """
    device = active_device() if device is None else device
    _free, total = device.mem_get_info(device_index)
    wanted, owner = parse_size(size, of=total), object()
    device.set_budget(device_index, wanted, owner=owner)
    try:
        in_force = device.budget(device_index) or wanted
        pass_budget_on(device_index, in_force)
        yield in_force
    finally:
        device.set_budget(device_index, None, owner=owner)
        pass_budget_on(device_index, device.budget(device_index))
