"""Tables of plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def align(rows: Sequence[Sequence[str]], *, left: Collection[int] = ()) -> list[str]:
    """Return a line for each row, with aligned columns.

    Columns are aligned on the right, the last one on the left. No line ends in blanks.

    Args:
        rows: The cells; every row has as many as the first.
        left: Other columns that are aligned on the left.
    """
    *columns, _last = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            [
                cell.ljust(width) if index in left else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=False))
            ]
            + [row[-1]]
        ).rstrip()
        for row in rows
    ]
