"""What crosses rooms: the figures of a test, as plain numbers."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: A property's name in reports is this and the figure's name.
PREFIX: Final = "gpumem"
#: Figures that may be not known.
OPTIONAL: Final = frozenset({"peak_process_bytes", "peak_card_bytes"})
_CARD: Final = re.compile("cuda[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Bytes of one card over one block of code; a figure is an ``int``, or not known.

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
        context_bytes: What the driver counts for this process beside the allocator
            (context, loaded kernels, libraries), as far as it is known.
        peak_process_bytes: Most bytes that the driver counted for this process at once;
            None where it cannot tell.
        peak_card_bytes: Most bytes of the card that all processes held at once; None
            where nobody has looked, or NVML cannot tell.
        end_requested_bytes: Asked for and alive at the block's end.
        end_active_bytes: In blocks not reusable at its end.
    """

    device_index: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_requested_bytes: int
    peak_active_bytes: int
    start_allocated_bytes: int
    end_allocated_bytes: int
    end_reserved_bytes: int
    num_ooms: int
    num_alloc_retries: int
    context_bytes: int = 0
    peak_process_bytes: int | None = None
    peak_card_bytes: int | None = None
    end_requested_bytes: int = 0
    end_active_bytes: int = 0

    def peak(self, metric: str) -> int | None:
        """Return the peak of ``"allocated"``, ``"reserved"`` or ``"process"`` bytes.

        Only the last can be None: the driver does not tell.
        """
        value: int | None = getattr(self, f"peak_{metric}_bytes")
        return value


def to_properties(phase: str, figures: MemoryFigures) -> list[tuple[str, int]]:
    """Return figures as flat properties: ``gpumem.call.cuda0.num_ooms``.

    What is not known is left out.
    """
    values = asdict(figures)
    index = values.pop("device_index")
    return [
        (f"{PREFIX}.{phase}.cuda{index}.{name}", value)
        for name, value in values.items()
        if value is not None
    ]


def from_properties(
    properties: Mapping[str, Any],
) -> dict[tuple[str, int], MemoryFigures]:
    """Rebuild figures from flat properties, keyed by phase and card."""
    grouped: dict[tuple[str, int], dict[str, int]] = {}
    for name, value in properties.items():
        parts = name.split(".")
        if len(parts) == 4 and parts[0] == PREFIX and _CARD.fullmatch(parts[2]):  # noqa: PLR2004  # the four parts of a name
            key = (parts[1], int(parts[2].removeprefix("cuda")))
            grouped.setdefault(key, {})[parts[3]] = int(value)
    known = [field.name for field in fields(MemoryFigures)]
    names = set(known) - {"device_index", *OPTIONAL}
    return {
        key: MemoryFigures(device_index=key[1], **values)
        for key, values in grouped.items()
        if values.keys() - OPTIONAL == names
    }
