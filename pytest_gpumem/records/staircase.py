"""Shows the steps of a fallback's check as a table of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.sizes import format_size
from pytest_gpumem.tables import align

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.records.record import FallbackStep


def staircase_table(steps: Iterable[FallbackStep]) -> str:
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
