"""What crosses rooms: the figures of a test, as plain numbers."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: A property's name in reports is this and the figure's name.
PREFIX = "gpumem"
_CARD: Final = re.compile("cuda[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Bytes of one card over one block of code; every figure is an ``int``.

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

    @property
    def peak_process_bytes(self) -> int:
        """The most that the driver counted for this process: reserved and context."""
        return self.peak_reserved_bytes + self.context_bytes

    def peak(self, metric: str) -> int:
        """Return the peak of ``"allocated"``, ``"reserved"`` or ``"process"`` bytes."""
        value: int = getattr(self, f"peak_{metric}_bytes")
        return value


def to_properties(phase: str, figures: MemoryFigures) -> list[tuple[str, int]]:
    """Return figures as flat properties: ``gpumem.call.cuda0.num_ooms``."""
    values = asdict(figures)
    index = values.pop("device_index")
    return [
        (f"{PREFIX}.{phase}.cuda{index}.{name}", value)
        for name, value in values.items()
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
    names = {field.name for field in fields(MemoryFigures)} - {"device_index"}
    return {
        key: MemoryFigures(device_index=key[1], **values)
        for key, values in grouped.items()
        if values.keys() == names
    }
