"""A card's memory as the CUDA driver sees it: address ranges, first fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final

#: The driver's granularity in bytes.
#: Source: cuMemGetAllocationGranularity answers 2 MiB on current cards.
GRANULARITY: Final = 2**21


class Driver:
    """The memory of one card.

    Args:
        total_bytes: The card's bytes.
        other_bytes: Bytes held by others: processes, the context, libraries.
        address_policy: ``"firstfit"`` hands out the lowest free range; ``"down"``
            hands out ever lower addresses and never uses one again.

    Attributes:
        calls: Where set to a list, every call is noted: name, bytes, code, address.
    """

    def __init__(
        self,
        total_bytes: int,
        *,
        other_bytes: int = 0,
        address_policy: str = "firstfit",
    ) -> None:
        self.total_bytes = total_bytes
        self.other_bytes = other_bytes
        self.used_bytes = 0
        self.calls: list[tuple[str, int, int, int | None]] | None = None
        self._sizes: dict[int, int] = {}
        # Free address ranges [start, end) below the frontier, by start.
        self._gaps: list[tuple[int, int]] = []
        self._frontier = 0
        self._descends = address_policy == "down"
        if self._descends:
            self._frontier = 2**43

    @property
    def free_bytes(self) -> int:
        """What ``cudaMemGetInfo`` calls free."""
        return max(self.total_bytes - self.other_bytes - self.used_bytes, 0)

    def malloc(self, nbytes: int) -> int | None:
        """Return the address of ``nbytes`` new bytes; None when out of memory."""
        if nbytes > self.free_bytes:
            self._note("cudaMalloc", nbytes, 2, None)
            return None
        address = self._place(-(-nbytes // GRANULARITY) * GRANULARITY)
        self._sizes[address] = nbytes
        self.used_bytes += nbytes
        self._note("cudaMalloc", nbytes, 0, address)
        return address

    def refuse(self, nbytes: int) -> None:
        """Note a request that is refused although there may be room."""
        self._note("cudaMalloc", nbytes, 2, None)

    def free(self, address: int) -> None:
        """Give the bytes at an address back."""
        nbytes = self._sizes.pop(address)
        self.used_bytes -= nbytes
        self._note("cudaFree", nbytes, 0, address)
        if not self._descends:
            span = -(-nbytes // GRANULARITY) * GRANULARITY
            self._release(address, address + span)

    def _note(self, name: str, nbytes: int, code: int, address: int | None) -> None:
        if self.calls is not None:
            self.calls.append((name, nbytes, code, address))

    def _place(self, span: int) -> int:
        if self._descends:
            self._frontier -= span
            return self._frontier
        for position, (start, end) in enumerate(self._gaps):
            if end - start >= span:
                if end - start == span:
                    del self._gaps[position]
                else:
                    self._gaps[position] = (start + span, end)
                return start
        start = self._frontier
        self._frontier += span
        return start

    def _release(self, start: int, end: int) -> None:
        position = bisect_left(self._gaps, (start, end))
        if position < len(self._gaps) and self._gaps[position][0] == end:
            end = self._gaps.pop(position)[1]
        if position and self._gaps[position - 1][1] == start:
            start = self._gaps.pop(position - 1)[0]
        if end == self._frontier:
            self._frontier = start
        else:
            insort(self._gaps, (start, end))
