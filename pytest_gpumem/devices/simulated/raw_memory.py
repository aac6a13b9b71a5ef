"""Memory that other libraries take from PyTorch's allocator by address.

A library such as CuPy or Numba asks ``torch.cuda.caching_allocator_alloc`` for bytes
and gets an address. Here the bytes are allocated on the simulated card, but there is no
memory at the address. As on a real card, host code must not read there.

Source: ``raw_alloc_with_stream``, ``free`` and ``enable`` of
``NativeCachingAllocator`` in ``c10/cuda/CUDACachingAllocator.cpp``.
"""

from __future__ import annotations

from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.memory import allocate_aside
from pytest_gpumem.devices.simulated.refusals import refuse


def raw_alloc(nbytes: int, stream: int) -> int:
    """Allocate bytes on the current card; return their address, or 0 for no bytes.

    Raises:
        torch.OutOfMemoryError: The card or its budget has no room.
    """
    if nbytes == 0:
        return 0
    card = card_of(None)
    block = allocate_aside(card, nbytes, stream)
    current_machine().raw_blocks[block.address] = (card, block)
    return block.address


def raw_delete(address: int) -> None:
    """Free the bytes at an address; nothing for 0.

    Raises:
        RuntimeError: ``raw_alloc`` has not returned the address (torch's message).
    """
    if address == 0:
        return
    found = current_machine().raw_blocks.pop(address, None)
    if found is None:
        raise RuntimeError(f"invalid device pointer: {address:#x}")
    card, block = found
    card.release(block)


def enable(value: bool) -> None:  # noqa: FBT001  # torch's signature
    """Keep the caching allocator in use.

    Raises:
        UnsupportedOnSimulatedDeviceError: The allocator would be switched off.
    """
    if not value:
        refuse("torch.cuda.caching_allocator_disabled")
