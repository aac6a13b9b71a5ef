"""The figures of a card over a block of code, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

from pytest_gpumem.records.codec import Count  # noqa: TC001  # the codec reads the types at run time

#: Figures that may be unknown.
OPTIONAL: Final = frozenset(
    {
        *("peak_process_bytes", "peak_card_bytes"),
        *("peak_fragmented_bytes", "peak_activations_bytes"),
    }
)
#: What allocated bytes are for, by the code that requested them.
#:
#: - ``weights``: parameters and buffers of modules, and what a load puts on the card;
#: - ``gradients``: gradients of parameters, and what else a backward computes;
#: - ``optimiser``: what an optimiser's step allocates, which is its state for the most part;
#: - ``activations``: what a module's call computes;
#: - ``workspaces``: memory that a library takes for itself;
#: - ``cache``: the keys and values that transformers' caches keep;
#: - ``unnamed``: all else, such as inputs, and what the card held before the test.
Kind = Literal[
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "workspaces",
    "cache",
    "unnamed",
]
#: All kinds, in the order in which they are shown.
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Bytes of one card over one block of code; a figure that is not known is None.

    Attributes:
        device_index: The card.
        peak_allocated_bytes: Most bytes in live tensors at once (sizes of their blocks).
        peak_reserved_bytes: Most bytes held from the driver at once.
        peak_requested_bytes: Most bytes that were requested and live at once.
        peak_active_bytes: Most bytes at once in blocks that cannot be reused yet.
        start_allocated_bytes: Allocated bytes at the start of the block of code.
        end_allocated_bytes: Allocated bytes at its end.
        end_reserved_bytes: Reserved bytes at its end.
        num_ooms: The number of out-of-memory errors in the block of code.
        num_alloc_retries: How often the allocator emptied its cache and tried again.
        context_bytes: Bytes that the driver counts for this process outside the
            allocator (context, loaded kernels, libraries), if they are known.
        peak_process_bytes: Most bytes that the driver counted for this process at once;
            None if it does not report them.
        peak_card_bytes: Most bytes of the card that all processes held at once; None
            if NVML was not asked, or does not report them.
        end_requested_bytes: Requested and live bytes at the end of the block of code.
        end_active_bytes: Bytes at its end in blocks that cannot be reused yet.
        peak_fragmented_bytes: Bytes that were reserved and not allocated at the moment
            of the allocated peak, as in an OOM's text "reserved by PyTorch but
            unallocated"; None on a real card, because PyTorch does not report both
            figures of one moment.
        peak_activations_bytes: Bytes of activations at the moment of the allocated peak,
            as ``KINDS`` defines them; None unless they were recorded.
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
    peak_activations_bytes: Count | None = None

    def peak(self, metric: str) -> int | None:
        """Return the peak of a limit's metric.

        The peak of ``"process"`` is None if the driver does not report it. The peaks of
        ``"fragmented"`` and ``"activations"`` are None on a real card, and that of
        ``"activations"`` also in child processes.
        """
        value: int | None = getattr(self, f"peak_{metric}_bytes")
        return value
