"""The allocator's statistics: nine families, each for all, small and large blocks."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pytest_gpumem.allocator.pools import PoolId

#: The families, in the order of ``SMALL`` and ``LARGE`` below.
#: Source: ``torch/cuda/memory.py``, ``memory_stats``.
FAMILIES: Final = (
    "allocation",
    "allocated_bytes",
    "active",
    "active_bytes",
    "requested_bytes",
    "segment",
    "reserved_bytes",
    "inactive_split",
    "inactive_split_bytes",
)
#: The key of the bytes held from the driver for each private pool.
#: Source: ``torch/cuda/memory.py``, ``memory_stats``.
PRIVATE: Final = "reserved_bytes_by_private_pools"


class Stat:
    """The current value, the peak, and running totals of increases and decreases."""

    __slots__ = ("_base", "allocated", "current", "peak")

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self.allocated = 0
        self._base = 0

    @property
    def freed(self) -> int:
        """The running total of decreases."""
        return self._base + self.allocated - self.current

    def increase(self, amount: int) -> None:
        """Add an amount, and raise the peak if the new value exceeds it."""
        self.allocated += amount
        self.current = current = self.current + amount
        if current > self.peak:
            self.peak = current

    def decrease(self, amount: int) -> None:
        """Subtract an amount."""
        self.current -= amount

    def reset_peak(self) -> None:
        """Reset the peak to the current value."""
        self.peak = self.current

    def reset_totals(self) -> None:
        """Reset the running totals to 0."""
        self.allocated = 0
        self._base = self.current


class Family:
    """One family: the statistics of all blocks, small blocks and large blocks."""

    __slots__ = ("all", "large", "small")

    def __init__(self) -> None:
        self.all = Stat()
        self.small = Stat()
        self.large = Stat()

    def add(self, is_small: bool, amount: int) -> None:  # noqa: FBT001  # the hot path
        """Add an amount, positive or negative, for a pool; 0 changes nothing.

        The code is written without function calls, because most of an allocation's time
        is spent here.
        """
        every = self.all
        pool = self.small if is_small else self.large
        every.current = total = every.current + amount
        pool.current = own = pool.current + amount
        if amount > 0:
            every.allocated += amount
            pool.allocated += amount
            if total > every.peak:
                every.peak = total
            if own > pool.peak:
                pool.peak = own


class Statistics:
    """All families and counters of one allocator.

    Until a block has waited for another stream, the active blocks are the allocated blocks.
    Both families are then the same objects and are counted once.
    """

    __slots__ = (
        "active",
        "active_bytes",
        "allocated_bytes",
        "allocation",
        "inactive_split",
        "inactive_split_bytes",
        "num_alloc_retries",
        "num_device_alloc",
        "num_device_free",
        "num_oom_rejections",
        "num_ooms",
        "num_sync_all_streams",
        "oversize_allocations",
        "oversize_segments",
        "requested_bytes",
        "reserved_by_pools",
        "reserved_bytes",
        "segment",
    )

    COUNTERS: Final = (
        "num_alloc_retries",
        "num_ooms",
        "num_sync_all_streams",
        "num_device_alloc",
        "num_device_free",
        "num_oom_rejections",
    )

    def __init__(self) -> None:
        for name in FAMILIES:
            setattr(self, name, Family())
        self.active = self.allocation
        self.active_bytes = self.allocated_bytes
        self.oversize_allocations = Stat()
        self.oversize_segments = Stat()
        self.reserved_by_pools: dict[PoolId, Family] = {}
        for name in self.COUNTERS:
            setattr(self, name, 0)

    def reserved_by(self, pool_id: PoolId) -> Family:
        """Return the family of a private pool's reserved bytes; create it if necessary."""
        return self.reserved_by_pools.setdefault(pool_id, Family())

    allocation: Family
    allocated_bytes: Family
    active: Family
    active_bytes: Family
    requested_bytes: Family
    segment: Family
    reserved_bytes: Family
    inactive_split: Family
    inactive_split_bytes: Family
    num_alloc_retries: int
    num_ooms: int
    num_sync_all_streams: int
    num_device_alloc: int
    num_device_free: int
    num_oom_rejections: int

    def separate_active(self) -> None:
        """Count active blocks separately: from now on, some are no longer allocated."""
        if self.active is self.allocation:
            self.active = deepcopy(self.allocation)
            self.active_bytes = deepcopy(self.allocated_bytes)

    def _stats(self) -> list[tuple[str, Stat]]:
        families = [(name, getattr(self, name)) for name in FAMILIES]
        families += [
            (f"{PRIVATE}.{first}_{second}", family)
            for (first, second), family in self.reserved_by_pools.items()
        ]
        named = [
            (f"{name}.{pool}", getattr(family, attribute))
            for name, family in families
            for pool, attribute in (
                ("all", "all"),
                ("large_pool", "large"),
                ("small_pool", "small"),
            )
        ]
        named.append(("oversize_allocations", self.oversize_allocations))
        named.append(("oversize_segments", self.oversize_segments))
        return named

    def reset_peak(self) -> None:
        """Reset every peak to the current value."""
        for _name, stat in self._stats():
            stat.reset_peak()

    def reset_accumulated(self) -> None:
        """Reset running totals and counters to 0."""
        for _name, stat in self._stats():
            stat.reset_totals()
        for name in self.COUNTERS:
            setattr(self, name, 0)

    def to_dict(self, *, max_split_size: int) -> dict[str, int]:
        """Return the flat dictionary of ``torch.cuda.memory_stats``, sorted by key.

        Args:
            max_split_size: Value to report, in bytes; -1 means no limit.
        """
        flat = {
            f"{name}.{kind}": getattr(stat, kind)
            for name, stat in self._stats()
            for kind in ("current", "peak", "allocated", "freed")
        }
        for name in self.COUNTERS:
            flat[name] = getattr(self, name)
        flat["max_split_size"] = max_split_size
        return dict(sorted(flat.items()))
