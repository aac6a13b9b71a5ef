"""A model of the CUDA driver's memory: address ranges, address space and pages."""

from __future__ import annotations

from bisect import bisect_left, insort
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.allocator.tenant import Tenants

#: The driver's granularity in bytes.
#: Source: cuMemGetAllocationGranularity returns 2 MiB on current cards.
GRANULARITY: Final = 2**21
#: The first address of reserved address space, and the alignment of reservations. They
#: are far from the addresses that ``malloc`` returns. Source: the driver in
#: ``tests/recordings/traces``.
VIRTUAL_BASE: Final = 2**44
VIRTUAL_ALIGNMENT: Final = 2**30
#: Return codes of a call that is out of memory and of a successful call.
#: Source: ``cudaErrorMemoryAllocation`` and ``CUDA_ERROR_OUT_OF_MEMORY``.
_OUT_OF_MEMORY: Final = 2
_SUCCESS: Final = 0


class Driver:
    """The memory of one card.

    Args:
        total_bytes: Bytes of the card's memory.
        other_bytes: Bytes that other processes hold from the beginning.
        context_bytes: Bytes that this process's context takes when it is created.
        address_policy: ``"firstfit"`` takes the lowest free address range; ``"down"``
            takes a lower address each time and never reuses an address.
        first_address: Where the card's addresses begin.

    Attributes:
        used_bytes: Bytes that this process holds, without its context.
        has_context: Whether this process has a context on the card.
        tenants: Other holders of the card's memory; the bytes that they hold are not free.
        host_bytes: If set, a function that returns the bytes that the host holds of the
            memory, which it shares with the card.
        free_cap: If set, a function that returns an upper limit of the free bytes.
        calls: If set, the list to which every call is appended: name, bytes, return code,
            and the address of the range; for pages, the number of consecutive equal calls
            in place of the address.

    Raises:
        ValueError: The address policy is unknown.
    """

    def __init__(
        self,
        total_bytes: int,
        *,
        other_bytes: int = 0,
        context_bytes: int = 0,
        address_policy: str = "firstfit",
        first_address: int = 0,
    ) -> None:
        if address_policy not in ("firstfit", "down"):
            raise ValueError(
                f"address_policy={address_policy!r}; accepted are 'firstfit', 'down'"
            )
        self.total_bytes = total_bytes
        self.other_bytes = other_bytes
        self.context_bytes = context_bytes
        self.has_context = False
        #: Ids of the processes that were on the card before this one.
        self._earlier: frozenset[int] = frozenset()
        self.used_bytes = 0
        self.tenants: list[Tenants] = []
        self.host_bytes: Callable[[], int] | None = None
        self.free_cap: Callable[[], int] | None = None
        self.calls: list[tuple[str, int, int, int | None]] | None = None
        self._sizes: dict[int, int] = {}
        # Free address ranges [start, end) below the frontier, sorted by start.
        self._gaps: list[tuple[int, int]] = []
        self._descends = address_policy == "down"
        self._frontier = first_address + (2**43 if self._descends else 0)
        self._virtual_frontier = first_address + VIRTUAL_BASE

    @property
    def free_bytes(self) -> int:
        """The free bytes that ``cudaMemGetInfo`` reports."""
        free = self.total_bytes - self.other_bytes - self.process_bytes
        if self.tenants:
            free -= sum(nbytes for _pid, nbytes in self.other_processes())
        if self.host_bytes is not None:
            free -= self.host_bytes()
        if self.free_cap is not None:
            free = min(free, self.free_cap())
        return max(free, 0)

    @property
    def process_bytes(self) -> int:
        """The bytes that NVML counts for this process: its memory and its context."""
        return self.used_bytes + (self.context_bytes if self.has_context else 0)

    def other_processes(self) -> list[tuple[int, int]]:
        """Return the process id and the bytes of every other process on the card."""
        return [each for tenants in self.tenants for each in tenants.others()]

    def processes(self) -> list[tuple[int | None, int]]:
        """Return the processes on the card and their bytes, as NVML lists them.

        They stand in the order in which they made their contexts: texts of real cards
        name consecutive process ids in that order. The id of this process is None.
        """
        others = self.other_processes()
        first = [each for each in others if each[0] in self._earlier]
        later = [each for each in others if each[0] not in self._earlier]
        if not self.has_context:
            first, later = others, []
        return [*first, (None, self.process_bytes), *later]

    def make_context(self) -> bool:
        """Create this process's context, which exists until the process ends.

        Returns:
            Whether the context exists now. It cannot be created if too few bytes are free.
        """
        if self.has_context:
            return True
        with self._changing():
            if self.context_bytes > self.free_bytes:
                return False
            self.has_context = True
            self._earlier = frozenset(pid for pid, _nbytes in self.other_processes())
        return True

    def _take(self, nbytes: int) -> bool:
        """Take bytes if they are free, while no other process can take or free bytes."""
        with self._changing():
            if nbytes > self.free_bytes:
                return False
            self.used_bytes += nbytes
        return True

    def _give(self, nbytes: int) -> None:
        with self._changing():
            self.used_bytes -= nbytes

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Stop other processes from changing their bytes; publish this process's bytes."""
        if not self.tenants:
            yield
            return
        with ExitStack() as stack:
            for tenants in self.tenants:
                stack.enter_context(tenants.changing())
            before = self.process_bytes
            yield
            if self.process_bytes != before:
                self._tell()

    def _tell(self) -> None:
        for tenants in self.tenants:
            tenants.hold(self.process_bytes)

    # -- ranges -------------------------------------------------------------------------

    def malloc(self, nbytes: int) -> int | None:
        """Return the address of ``nbytes`` new bytes; None when out of memory."""
        if not self._take(nbytes):
            self._note("cudaMalloc", nbytes, _OUT_OF_MEMORY, None)
            return None
        address = self._take_range(-(-nbytes // GRANULARITY) * GRANULARITY)
        self._sizes[address] = nbytes
        self._note("cudaMalloc", nbytes, _SUCCESS, address)
        return address

    def refuse(self, nbytes: int) -> None:
        """Record a request that is refused although there may be room."""
        self._note("cudaMalloc", nbytes, _OUT_OF_MEMORY, None)

    def free(self, address: int) -> None:
        """Free the bytes at an address."""
        nbytes = self._sizes.pop(address)
        self._give(nbytes)
        self._note("cudaFree", nbytes, _SUCCESS, address)
        if not self._descends:
            span = -(-nbytes // GRANULARITY) * GRANULARITY
            self._release(address, address + span)

    # -- address space and pages --------------------------------------------------------

    def reserve(self, nbytes: int) -> int:
        """Return the address of ``nbytes`` bytes of address space without memory."""
        address = self._virtual_frontier
        span = -(-nbytes // VIRTUAL_ALIGNMENT) * VIRTUAL_ALIGNMENT
        self._virtual_frontier += span
        self._note_pages("cuMemAddressReserve", nbytes, 1)
        return address

    def unreserve(self, nbytes: int) -> None:
        """Release ``nbytes`` bytes of address space; these addresses are not reused."""
        self._note_pages("cuMemAddressFree", nbytes, 1)

    def map_pages(self, count: int, page_bytes: int) -> bool:
        """Create and map pages; if one cannot be created, none is kept.

        Args:
            count: Number of pages.
            page_bytes: Bytes of each page.

        Returns:
            Whether all pages are mapped.
        """
        if not self._take(count * page_bytes):
            possible = min(self.free_bytes // page_bytes, count - 1)
            self._note_pages("cuMemCreate", page_bytes, possible)
            self.refuse_pages(page_bytes)
            self._note_pages("physFree", page_bytes, possible)
            return False
        self._note_pages("cuMemCreate", page_bytes, count)
        self._note_pages("cuMemMap", page_bytes, count)
        return True

    def refuse_pages(self, page_bytes: int) -> None:
        """Record a page that is refused."""
        self._note_pages("cuMemCreate", page_bytes, 1, _OUT_OF_MEMORY)

    def unmap_pages(self, count: int, page_bytes: int) -> None:
        """Unmap pages and free their memory, one page at a time."""
        self._give(count * page_bytes)
        if self.calls is not None:
            for _page in range(count):
                self._note_pages("cuMemUnmap", page_bytes, 1)
                self._note_pages("physFree", page_bytes, 1)

    # -- recorded calls and addresses ---------------------------------------------------

    def _note(self, name: str, nbytes: int, code: int, address: int | None) -> None:
        if self.calls is not None:
            self.calls.append((name, nbytes, code, address))

    def _note_pages(
        self, name: str, nbytes: int, count: int, code: int = _SUCCESS
    ) -> None:
        """Record calls of one kind, joined with equal calls directly before them."""
        calls = self.calls
        if calls is None or not count:
            return
        if calls and calls[-1][:3] == (name, nbytes, code):
            count += calls.pop()[3] or 0
        calls.append((name, nbytes, code, count))

    def _take_range(self, span: int) -> int:
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
