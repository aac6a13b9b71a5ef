"""What every run of a sweep must find as the first one did."""

from __future__ import annotations

import gc
import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.instruments.logs import release_log_records

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices import Device


class RandomState:
    """The state of all random generators that a run may draw from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._cards = torch.cuda.get_rng_state_all()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Put every generator back."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        torch.cuda.set_rng_state_all(self._cards)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Leave what exists already out of collections, for a block: they get cheap."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def allocated_bytes(device: Device) -> int:
    """Return the bytes that all cards have allocated."""
    return sum(
        device.memory_stats(index).get("allocated_bytes.all.current", 0)
        for index in range(device.device_count)
    )


def num_ooms(device: Device) -> int:
    """Return how often an allocation failed so far, over all cards."""
    return sum(
        device.memory_stats(index).get("num_ooms", 0)
        for index in range(device.device_count)
    )


def settle(device: Device, start_bytes: int) -> tuple[int, int]:
    """Free what nobody needs, and return what is left.

    Args:
        device: The cards.
        start_bytes: Bytes allocated before.

    Returns:
        Bytes allocated beyond those, and bytes that only captured log records held.
    """
    gc.collect()
    device.empty_cache()
    left = allocated_bytes(device) - start_bytes
    if left <= 0:
        return left, 0
    release_log_records()
    gc.collect()
    device.empty_cache()
    remaining = allocated_bytes(device) - start_bytes
    return remaining, left - remaining
