"""A sorted list that stays fast with a million entries."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    Key = tuple[Any, ...]

#: Length of the longest chunk. Chosen by measurement: any length from 200 to 2000 is
#: nearly as fast.
_CHUNK: Final = 512


class FreeList:
    """Sorted tuples in chunks: insertion and search stay fast at any length.

    Entries are compared by their first fields, which must differ between any two entries.
    """

    __slots__ = ("_chunks", "_lasts")

    def __init__(self) -> None:
        self._chunks: list[list[Key]] = []
        self._lasts: list[Key] = []

    def __len__(self) -> int:
        return sum(map(len, self._chunks))

    def __iter__(self) -> Iterator[Key]:
        for chunk in self._chunks:
            yield from chunk

    def add(self, key: Key) -> None:
        """Insert an entry."""
        lasts = self._lasts
        position = bisect_left(lasts, key)
        if position == len(lasts):
            if not lasts:
                self._chunks.append([key])
                lasts.append(key)
                return
            position -= 1
            chunk = self._chunks[position]
            chunk.append(key)
            lasts[position] = key
        else:
            chunk = self._chunks[position]
            insort(chunk, key)
        if len(chunk) > _CHUNK:
            half = len(chunk) // 2
            self._chunks.insert(position + 1, chunk[half:])
            del chunk[half:]
            lasts.insert(position, chunk[-1])

    def remove(self, key: Key) -> None:
        """Remove an entry, which must be in the list."""
        position = bisect_left(self._lasts, key)
        chunk = self._chunks[position]
        del chunk[bisect_left(chunk, key)]
        if not chunk:
            del self._chunks[position]
            del self._lasts[position]
        else:
            self._lasts[position] = chunk[-1]

    def first_from(self, key: Key) -> Key | None:
        """Return the first entry that is not less than ``key``; None if none is."""
        position = bisect_left(self._lasts, key)
        if position == len(self._lasts):
            return None
        chunk = self._chunks[position]
        return chunk[bisect_left(chunk, key)]

    def iterate_from(self, key: Key) -> Iterator[Key]:
        """Yield every entry that is not less than ``key``, in order."""
        position = bisect_left(self._lasts, key)
        if position == len(self._lasts):
            return
        chunk = self._chunks[position]
        yield from chunk[bisect_left(chunk, key) :]
        for later in self._chunks[position + 1 :]:
            yield from later
