"""Devices: one protocol over a real CUDA device and a simulated one.

The names are those of PyTorch. Added are budgets, a view of single allocations, and the
means to make one fail.
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
        """Return the figures up to now; may be called again."""

    def peek(self) -> MemoryFigures:
        """Return the figures while an allocation is being served, for its observers."""

    def close(self) -> MemoryFigures:
        """Return the final figures and stop tracking."""


@runtime_checkable
class Device(Protocol):
    """The functions of a machine's cards that instruments need; sizes are bytes."""

    @property
    def kind(self) -> str:
        """``"cuda"`` or ``"simulated"``."""

    @property
    def device_count(self) -> int:
        """How many cards there are."""

    @property
    def num_requests(self) -> int:
        """A number that grows when a card is used: allocations asked for so far."""

    def name(self, index: int) -> str:
        """Return a card's name as ``torch.cuda.get_device_name`` has it."""

    def mem_get_info(self, index: int) -> tuple[int, int]:
        """Return free and total bytes, as user code sees them."""

    def total_bytes(self, index: int) -> int:
        """Return a card's total bytes; cheaper than ``mem_get_info`` may be."""

    def card_id(self, index: int) -> str:
        """Return a card's UUID, by which every process knows it."""

    def context_bytes(self, index: int) -> int:
        """Return the driver's bytes of this process outside the allocator.

        They are 0 before the card is used, and if the driver does not report them.
        """

    def others_bytes(self, index: int) -> int:
        """Return the bytes of a card that other processes hold."""

    def memory_stats(self, index: int) -> Mapping[str, int]:
        """Return ``torch.cuda.memory_stats``'s flat dictionary."""

    def counted(self, index: int) -> Reading:
        """Return NVML's present bytes of this process and of the card.

        Never raises, and uses no card for it.
        """

    def empty_cache(self) -> None:
        """Free cuBLAS workspaces and cached segments of every card."""

    def budget(self, index: int) -> int | None:
        """Return the smallest budget in force on a card, or None."""

    def set_budget(
        self, index: int, budget_bytes: int | None, *, owner: object = None
    ) -> None:
        """Cap a card for an owner (inclusive); None removes the owner's cap.

        The smallest cap of all owners holds, and functions that report free memory agree.

        Raises:
            BudgetError: Not between 1 byte and the card's total.
        """

    def block_bytes(self, storage: Any) -> int:
        """Return the bytes of the allocator's block under a storage of a card."""

    def block_address(self, storage: Any) -> int | None:
        """Return where that block is on the card; None for a storage on the host."""

    def segments(self, index: int) -> Sequence[Mapping[str, Any]]:
        """Return a card's segments, as ``torch.cuda.memory_snapshot`` shows them."""

    def holds(self, storage: Any, index: int) -> bool:
        """Tell whether a storage is on a card of this device."""

    def open_tracker(self, index: int) -> Tracker:
        """Start tracking a card's peaks.

        User code goes on to read its own from torch.
        """

    def restore(self) -> None:
        """Restore the functions of torch that trackers have replaced, at the end of a run."""

    def failing(
        self, fails: Callable[[int, int], bool]
    ) -> AbstractContextManager[None]:
        """Ask ``fails(device_index, nbytes)`` before each allocation of a block.

        Where it answers True the allocation fails as if the card were full.
        """

    def fail_allocation(self, index: int, nbytes: int) -> str:
        """Fail a request of ``nbytes`` bytes as the caching allocator does.

        Caches are flushed, ``num_ooms`` counts and observers are called; what would
        have been raised is returned as its text.
        """

    def observing_ooms(
        self, observe: Callable[[int, int], None]
    ) -> AbstractContextManager[None]:
        """Call ``observe`` after each request of a block that the allocator failed.

        It gets the card's index and the bytes asked for (on a real card, those of the
        segment), in the thread that asked, before the error is raised.
        """

    def watching(
        self, watch: Callable[[int, int, int], Callable[[int], None] | None]
    ) -> AbstractContextManager[bool]:
        """Call ``watch`` after each allocation of a block.

        It gets the card's index, its allocated and its reserved bytes, and may ask
        nothing of the device; what it returns is called as soon as that is possible,
        with the bytes asked for.

        Yields:
            Whether this device can do so (a real card cannot).
        """

    def tracing(
        self, trace: Callable[[int, int, int, int, int], None]
    ) -> AbstractContextManager[bool]:
        """Call ``trace`` after each allocation and each release of a block.

        It gets the card's index, the block's address, the bytes gained (negative for a
        release), and the card's allocated and reserved bytes; it may ask nothing of
        the device.

        Yields:
            Whether this device can do so (a real card cannot).
        """

    def recording(self) -> AbstractContextManager[CudaHistory | None]:
        """Record the changes of memory over a block, to be read afterwards.

        Yields:
            The history, on a card that cannot trace; None on one that can.
        """


def allocated_bytes(device: Device) -> int:
    """Return the bytes in live tensors on all cards."""
    return sum(
        device.memory_stats(index).get("allocated_bytes.all.current", 0)
        for index in range(device.device_count)
    )


__all__ = ["Device", "Tracker", "allocated_bytes"]
