"""The caching allocator's out-of-memory error and its message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pytest_gpumem.allocator.versions import NEWEST, AllocatorVersion

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Requests of at least this many bytes are refused without a query of the card.
MAX_REQUEST: Final = 2**60
TOO_LARGE: Final = "CUDA out of memory. Tried to allocate more than 1EB memory."


class OutOfMemory(Exception):  # noqa: N818  # the name of torch's class
    """A request that the card cannot serve.

    Attributes:
        nbytes: Requested bytes.
        rounded_bytes: Bytes of the block that the request needs.
        segment_bytes: Bytes of the segment that the driver refused.
        device_index: Index of the card.
    """

    def __init__(
        self,
        message: str,
        *,
        nbytes: int,
        rounded_bytes: int,
        segment_bytes: int,
        device_index: int,
    ) -> None:
        super().__init__(message)
        self.nbytes = nbytes
        self.rounded_bytes = rounded_bytes
        self.segment_bytes = segment_bytes
        self.device_index = device_index

    @property
    def message(self) -> str:
        """The message of ``torch.OutOfMemoryError``."""
        return str(self)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The bytes that a process holds on a card; a ``pid`` of None is this process."""

    pid: int | None
    nbytes: int


def format_bytes(nbytes: int) -> str:
    """Return bytes as text in the allocator's format.

    A number equal to a unit is written in the smaller unit.

    Source: ``c10/util``'s ``format_size``: two decimals; GiB is the largest unit.
    """
    if nbytes <= 2**10:
        return f"{nbytes} bytes"
    for unit, size in (("KiB", 2**10), ("MiB", 2**20)):
        if nbytes <= size * 2**10:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 2**30:.2f} GiB"


def oom_text(
    *,
    device_index: int,
    segment_bytes: int,
    total_bytes: int,
    free_bytes: int,
    allowed_bytes: int | None,
    allocated_bytes: int,
    reserved_bytes: int,
    private_bytes: int = 0,
    processes: Sequence[ProcessMemory],
    is_expandable: bool = False,
    version: AllocatorVersion = NEWEST,
) -> str:
    """Return the message of an out-of-memory error.

    Args:
        device_index: Index of the card.
        segment_bytes: Bytes of the segment that was requested from the driver, not of
            the tensor.
        total_bytes: The card's total bytes.
        free_bytes: The free bytes that the driver reports after the cache was flushed.
        allowed_bytes: The limit, if a memory fraction is set.
        allocated_bytes: Bytes in live blocks.
        reserved_bytes: Bytes held from the driver.
        private_bytes: Free bytes in private pools; torch's message calls them allocated.
        processes: The memory that each process holds on the card.
        is_expandable: Whether segments grow page by page.
        version: The PyTorch version whose last sentences the message has.
    """
    held = "".join(_process(process) for process in processes)
    allowed = (
        "" if allowed_bytes is None else f"{format_bytes(allowed_bytes)} allowed; "
    )
    allocated_bytes += private_bytes
    private = (
        f"with {format_bytes(private_bytes)} allocated in private pools (e.g., CUDA "
        "Graphs), "
        if private_bytes
        else ""
    )
    return (
        f"CUDA out of memory. Tried to allocate {format_bytes(segment_bytes)}. "
        f"GPU {device_index} has a total capacity of {format_bytes(total_bytes)} of "
        f"which {format_bytes(free_bytes)} is free. {held}{allowed}Of the allocated "
        f"memory {format_bytes(allocated_bytes)} is allocated by PyTorch, {private}and "
        f"{format_bytes(reserved_bytes - allocated_bytes)} is reserved by PyTorch but "
        f"unallocated.{version.expandable_help if is_expandable else version.help}"
    )


def _process(process: ProcessMemory) -> str:
    used = f"{format_bytes(process.nbytes)} memory in use. "
    if process.pid is None:
        return f"Including non-PyTorch memory, this process has {used}"
    return f"Process {process.pid} has {used}"
