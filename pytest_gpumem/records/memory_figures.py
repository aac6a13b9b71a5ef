"""The figures of a card over a block of code, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pytest_gpumem.records.codec import Count  # noqa: TC001  # types are read

#: Figures that may be not known.
OPTIONAL: Final = frozenset(
    {"peak_process_bytes", "peak_card_bytes", "peak_fragmented_bytes"}
)


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Bytes of one card over one block of code; a figure is an ``int``, or unknown.

    Attributes:
        device_index: The card.
        peak_allocated_bytes: Most bytes in live tensors at once (block sizes).
        peak_reserved_bytes: Most bytes held from the driver at once.
        peak_requested_bytes: Most bytes asked for and alive at once.
        peak_active_bytes: Most bytes in blocks not reusable at once.
        start_allocated_bytes: Allocated at the start of the block.
        end_allocated_bytes: Allocated at its end.
        end_reserved_bytes: Reserved at its end.
        num_ooms: Out-of-memory errors raised in the block.
        num_alloc_retries: Cache flushes followed by a second try in the block.
        context_bytes: Bytes that the driver counts for this process outside the
            allocator (context, loaded kernels, libraries), if they are known.
        peak_process_bytes: Most bytes that the driver counted for this process at once;
            None if it does not report them.
        peak_card_bytes: Most bytes of the card that all processes held at once; None
            if NVML was not asked, or does not report them.
        end_requested_bytes: Asked for and alive at the block's end.
        end_active_bytes: In blocks not reusable at its end.
        peak_fragmented_bytes: Reserved and not allocated at the moment in which most was
            allocated, as an OOM's text has "reserved by PyTorch but unallocated"; None
            on a real card, of which PyTorch does not tell what was at one moment.
    """

    device_index: Count
    peak_allocated_bytes: Count
    peak_reserved_bytes: Count
    peak_requested_bytes: Count
    peak_active_bytes: Count
    start_allocated_bytes: Count
    end_allocated_bytes: Count
    end_reserved_bytes: Count
    num_ooms: Count
    num_alloc_retries: Count
    context_bytes: Count = 0
    peak_process_bytes: Count | None = None
    peak_card_bytes: Count | None = None
    end_requested_bytes: Count = 0
    end_active_bytes: Count = 0
    peak_fragmented_bytes: Count | None = None

    def peak(self, metric: str) -> int | None:
        """Return the peak of a limit's metric.

        That of ``"process"`` is None where the driver does not tell, and that of
        ``"fragmented"`` on a real card.
        """
        value: int | None = getattr(self, f"peak_{metric}_bytes")
        return value
