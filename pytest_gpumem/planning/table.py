"""Shows the results of a model's task on several cards as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.sizes import format_size
from pytest_gpumem.tables import align

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.planning.fit import CardFit, FitReport


def fit_table(report: FitReport) -> Iterator[str]:
    """Yield the lines of a report."""
    yield (
        f"{report.model}, {report.num_parameters / 1e6:,.0f} M parameters: "
        f"{report.task.describe()}"
    )
    yield ""
    rows = [("card", "total", "needs", "fits", "largest batch", "")]
    rows += [_row(each) for each in report.cards]
    yield from align(rows, left=(0,))
    yield ""
    yield "what takes the memory, at the peak"
    kinds = [name for each in report.cards for name in each.needs.kinds]
    names = list(dict.fromkeys(kinds))
    parts = [("card", *names, "not in use", "context", "")]
    parts += [_parts(each, names) for each in report.cards]
    yield from align(parts, left=(0,))


def _parts(each: CardFit, names: list[str]) -> tuple[str, ...]:
    needs = each.needs
    sizes = [
        *(needs.kinds.get(name, 0) for name in names),
        needs.reserved_bytes - needs.allocated_bytes,
        needs.context_bytes,
    ]
    return each.card, *map(format_size, sizes), ""


def _row(each: CardFit) -> tuple[str, str, str, str, str, str]:
    batch = each.largest_batch
    words = ""
    if not each.fits:
        helps = " or ".join(each.helps)
        words = f"runs out in {each.ran_out_in}"
        words += f"; fits with {helps}" if helps else "; no change that was tried helps"
    return (
        each.card,
        format_size(each.total_bytes),
        format_size(each.needs.total_bytes),
        "yes" if each.fits else "no",
        "-" if batch is None else "none" if not batch else str(batch),
        words,
    )
