"""The most used statistics of an allocator, as plain integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.allocator.stats import Statistics


class Figures:
    """Reads single values from ``stats``, without building a dictionary.

    Attributes:
        stats: The allocator's statistics.
    """

    stats: Statistics
    _past_ooms = _past_retries = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes in live blocks."""
        return self.stats.allocated_bytes.all.current

    @property
    def peak_allocated_bytes(self) -> int:
        """The most bytes in live blocks at one time since the last reset."""
        return self.stats.allocated_bytes.all.peak

    @property
    def reserved_bytes(self) -> int:
        """Bytes held from the driver."""
        return self.stats.reserved_bytes.all.current

    @property
    def peak_reserved_bytes(self) -> int:
        """The most bytes held from the driver at one time since the last reset."""
        return self.stats.reserved_bytes.all.peak

    @property
    def requested_bytes(self) -> int:
        """Requested bytes of all blocks that cannot be used again yet."""
        return self.stats.requested_bytes.all.current

    @property
    def peak_requested_bytes(self) -> int:
        """The most requested bytes at one time since the last reset."""
        return self.stats.requested_bytes.all.peak

    @property
    def active_bytes(self) -> int:
        """Bytes in blocks that cannot be used again yet."""
        return self.stats.active_bytes.all.current

    @property
    def peak_active_bytes(self) -> int:
        """The most active bytes at one time since the last reset."""
        return self.stats.active_bytes.all.peak

    @property
    def num_ooms(self) -> int:
        """Out-of-memory errors raised so far; a reset does not change this count."""
        return self._past_ooms + self.stats.num_ooms

    @property
    def num_alloc_retries(self) -> int:
        """Cache flushes with a retry so far; a reset does not change this count."""
        return self._past_retries + self.stats.num_alloc_retries

    def reset_peak_stats(self) -> None:
        """Reset every peak to the current value."""
        self.stats.reset_peak()

    def reset_accumulated_stats(self) -> None:
        """Reset the running totals and counters in ``stats`` to 0."""
        self._past_ooms, self._past_retries = self.num_ooms, self.num_alloc_retries
        self.stats.reset_accumulated()
