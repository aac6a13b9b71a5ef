"""A number that several processes count up together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.tenancy.entries import Folder

if TYPE_CHECKING:
    import os


def count_up(folder: str | os.PathLike[str], most: int) -> bool:
    """Count by one, unless the number is ``most`` already; tell whether it was not."""
    shared = Folder(folder)
    file = shared.path / "count"
    with shared.mutex():
        try:
            count = int(file.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):  # the first, or one killed in writing
            count = 0
        if count >= most:
            return False
        file.write_text(str(count + 1), encoding="ascii")
        return True
