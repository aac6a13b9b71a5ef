"""Devices: one protocol for the real and for the simulated CUDA device.

The names are those of PyTorch. In addition, the protocol has budgets, observers of single
allocations, and a way to make an allocation fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from pytest_gpumem.devices.cuda_history import CudaHistory
    from pytest_gpumem.devices.nvml import Reading
    from pytest_gpumem.records.memory_figures import MemoryFigures


class Tracker(Protocol):
    """Peaks of one card since the tracker was opened."""

    def read(self) -> MemoryFigures:
        """Return the figures so far; may be called again."""

    def peek(self) -> MemoryFigures:
        """Return the figures so far; for observers, while an allocation is served."""

    def close(self) -> MemoryFigures:
        """Stop tracking and return the final figures."""


@runtime_checkable
class Device(Protocol):
    """The functions of a machine's cards that instruments need; sizes are bytes."""

    @property
    def kind(self) -> str:
        """``"cuda"`` or ``"simulated"``."""

    @property
    def device_count(self) -> int:
        """The number of cards."""

    @property
    def num_requests(self) -> int:
        """The number of allocations requested so far; it grows when a card is used."""

    def name(self, index: int) -> str:
        """Return a card's name, as ``torch.cuda.get_device_name`` does."""

    def mem_get_info(self, index: int) -> tuple[int, int]:
        """Return free and total bytes, with the same values as user code gets."""

    def total_bytes(self, index: int) -> int:
        """Return a card's total bytes; can be faster than ``mem_get_info``."""

    def card_id(self, index: int) -> str:
        """Return a card's UUID, which is the same in every process."""

    def context_bytes(self, index: int) -> int:
        """Return the bytes that this process holds on the card outside the allocator.

        The result is 0 before the card is used, and if the driver does not report it.
        """

    def others_bytes(self, index: int) -> int:
        """Return the bytes of a card that other processes hold."""

    def memory_stats(self, index: int) -> Mapping[str, int]:
        """Return the flat dictionary of ``torch.cuda.memory_stats``."""

    def counted(self, index: int) -> Reading:
        """Return NVML's present bytes of this process and of the card.

        This never raises, and does not use a card.
        """

    def empty_cache(self) -> None:
        """Free cuBLAS workspaces and cached segments of every card."""

    def budget(self, index: int) -> int | None:
        """Return the smallest budget that applies on a card, or None."""

    def set_budget(
        self, index: int, budget_bytes: int | None, *, owner: object = None
    ) -> None:
        """Cap a card for an owner (inclusive); None removes the owner's cap.

        The smallest cap of all owners applies. Functions that report free memory agree with
        it.

        Raises:
            BudgetError: The budget is not between 1 byte and the card's total.
        """

    def block_bytes(self, storage: Any) -> int:
        """Return the bytes of the allocator's block that holds a storage on a card."""

    def block_address(self, storage: Any) -> int | None:
        """Return the address of a storage's block; None for a storage on the host."""

    def segments(self, index: int) -> Sequence[Mapping[str, Any]]:
        """Return a card's segments in the format of ``torch.cuda.memory_snapshot``."""

    def holds(self, storage: Any, index: int) -> bool:
        """Return whether a storage is on a card of this device."""

    def open_tracker(self, index: int) -> Tracker:
        """Start tracking a card's peaks.

        User code still reads its own peaks from torch.
        """

    def restore(self) -> None:
        """Restore torch's functions that trackers have replaced; for the end of a run."""

    def failing(
        self, fails: Callable[[int, int], bool]
    ) -> AbstractContextManager[None]:
        """Call ``fails(device_index, nbytes)`` before each allocation of a block.

        If it returns True, the allocation fails as if the card were full.
        """

    def fail_allocation(self, index: int, nbytes: int) -> str:
        """Fail a request of ``nbytes`` bytes as the caching allocator does.

        The cache is flushed, ``num_ooms`` is increased and observers are called. The message
        of the error is returned; the error is not raised.
        """

    def observing_ooms(
        self, observe: Callable[[int, int], None]
    ) -> AbstractContextManager[None]:
        """Call ``observe`` after each failed request for a block.

        The arguments are the card's index and the requested bytes (on a real card, those of
        the segment). The call is made in the requesting thread, before the error is raised.
        """

    def watching(
        self, watch: Callable[[int, int, int], Callable[[int], None] | None]
    ) -> AbstractContextManager[bool]:
        """Call ``watch`` after each allocation of a block.

        The arguments are the card's index, its allocated bytes and its reserved bytes.
        ``watch`` must not use the device. If it returns a function, that function is called
        as soon as possible, with the requested bytes.

        Yields:
            Whether this device supports it (a real card does not).
        """

    def tracing(
        self, trace: Callable[[int, int, int, int, int], None]
    ) -> AbstractContextManager[bool]:
        """Call ``trace`` after each allocation and each release of a block.

        The arguments are the card's index, the block's address, the added bytes (negative
        for a release), and the card's allocated and reserved bytes. ``trace`` must not use
        the device.

        Yields:
            Whether this device supports it (a real card does not).
        """

    def recording(self) -> AbstractContextManager[CudaHistory | None]:
        """Record the changes of memory inside a ``with`` block, to be read afterwards.

        Yields:
            The history if the device does not support ``tracing``; None if it does.
        """


def allocated_bytes(device: Device) -> int:
    """Return the bytes in live tensors on all cards."""
    return sum(
        device.memory_stats(index).get("allocated_bytes.all.current", 0)
        for index in range(device.device_count)
    )


__all__ = ["Device", "Tracker", "allocated_bytes"]
