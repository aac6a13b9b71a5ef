"""The figures of an allocator that are asked for most, as plain integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.allocator.stats import Statistics


class Figures:
    """Reads single figures off ``stats``, without building a dictionary.

    Attributes:
        stats: The statistics.
    """

    stats: Statistics
    _past_ooms = _past_retries = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes in live blocks."""
        return self.stats.allocated_bytes.all.current

    @property
    def peak_allocated_bytes(self) -> int:
        """Most bytes in live blocks at once since the last reset."""
        return self.stats.allocated_bytes.all.peak

    @property
    def reserved_bytes(self) -> int:
        """Bytes held from the driver."""
        return self.stats.reserved_bytes.all.current

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes held from the driver at once since the last reset."""
        return self.stats.reserved_bytes.all.peak

    @property
    def requested_bytes(self) -> int:
        """Bytes asked for and not yet usable again."""
        return self.stats.requested_bytes.all.current

    @property
    def peak_requested_bytes(self) -> int:
        """Most requested bytes at once since the last reset."""
        return self.stats.requested_bytes.all.peak

    @property
    def active_bytes(self) -> int:
        """Bytes in blocks that are not usable again yet."""
        return self.stats.active_bytes.all.current

    @property
    def peak_active_bytes(self) -> int:
        """Most active bytes at once since the last reset."""
        return self.stats.active_bytes.all.peak

    @property
    def num_ooms(self) -> int:
        """Out-of-memory errors raised so far, whatever was reset."""
        return self._past_ooms + self.stats.num_ooms

    @property
    def num_alloc_retries(self) -> int:
        """Cache flushes followed by a second try so far, whatever was reset."""
        return self._past_retries + self.stats.num_alloc_retries

    def reset_peak_stats(self) -> None:
        """Let every peak begin again at the current value."""
        self.stats.reset_peak()

    def reset_accumulated_stats(self) -> None:
        """Let running totals and counters begin again at 0, in ``stats``."""
        self._past_ooms, self._past_retries = self.num_ooms, self.num_alloc_retries
        self.stats.reset_accumulated()
