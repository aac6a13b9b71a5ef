"""Shows the steps of a fallback's check as a table of text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pytest_gpumem.sizes import format_size
from pytest_gpumem.tables import align

if TYPE_CHECKING:
    from collections.abc import Iterable


class StaircaseStep(Protocol):
    """A step of a fallback's check; ``records.record.FallbackStep`` is one."""

    @property
    def cause(self) -> str:
        """The budget or fault, in words."""

    @property
    def num_ooms(self) -> int:
        """Out-of-memory errors."""

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes held from the driver at once."""

    @property
    def left_bytes(self) -> int:
        """Bytes that stay on the card."""

    @property
    def rung(self) -> str:
        """Where the fallback ended."""


def staircase_table(steps: Iterable[StaircaseStep]) -> str:
    """Return a line for each step."""
    rows = [("budget or fault", "OOMs", "peak reserved", "left", "rung")]
    rows += [
        (
            step.cause,
            str(step.num_ooms or "-"),
            format_size(step.peak_reserved_bytes),
            format_size(step.left_bytes) if step.left_bytes > 0 else "-",
            step.rung,
        )
        for step in steps
    ]
    return "\n".join(align(rows))
