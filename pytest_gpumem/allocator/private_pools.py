"""Private pools: which requests they serve, and when their segments are released.

Source: ``CUDACachingAllocator.cpp``, torch 2.13: ``beginAllocateToPool``,
``endAllocateToPool``, ``releasePool``, ``get_pool``, ``try_mempool_fallback`` and
``release_cached_blocks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_gpumem.allocator.heap import Heap
from pytest_gpumem.allocator.pools import PrivatePool
from pytest_gpumem.allocator.release import release_cached

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.allocator.config import AllocatorConfig
    from pytest_gpumem.allocator.driver import Driver
    from pytest_gpumem.allocator.pools import Pool, PoolId


class _Route(NamedTuple):
    """A rule that sends requests to a private pool.

    Attributes:
        pool: The private pool.
        takes: Returns whether the rule applies to a request on a stream; the answer may
            depend on the current thread.
    """

    pool: PrivatePool
    takes: Callable[[int], bool]


class PrivatePools(Heap):
    """A heap that has private pools in addition to the default ones.

    Attributes:
        private_pools: The existing private pools, by id.
    """

    def __init__(
        self, driver: Driver, *, config: AllocatorConfig, device_index: int
    ) -> None:
        super().__init__(driver, config=config, device_index=device_index)
        self.private_pools: dict[PoolId, PrivatePool] = {}
        self._routes: list[_Route] = []
        self._for_ooms: list[PoolId] = []
        self._num_captures = 0

    def use_pool(
        self, pool_id: PoolId, *, on_oom: bool = False, splits: bool = True
    ) -> None:
        """Create a private pool, or count one more user of an existing one.

        Args:
            pool_id: The pool's id.
            on_oom: Whether the pool's free blocks may serve requests of the default pool
                for which the driver has no memory.
            splits: Whether a new pool splits its blocks to the requested size.

        Raises:
            RuntimeError: The pool has no user any more, but still has segments (torch's
                message).
        """
        pool = self.private_pools.get(pool_id)
        if pool is None:
            self.private_pools[pool_id] = PrivatePool(pool_id, splits=splits)
        elif not pool.use_count:
            raise RuntimeError(self.config.version.asserts.pool_is_used)
        else:
            pool.use_count += 1
        if on_oom:
            self._for_ooms.append(pool_id)

    def begin_pool(
        self,
        pool_id: PoolId,
        takes: Callable[[int], bool],
        *,
        captures: bool = False,
    ) -> None:
        """Route requests to a pool, and count the route as one more user of the pool.

        Args:
            pool_id: The pool's id; the pool is created if it does not exist.
            takes: Returns whether a request on the stream of the given handle goes to the
                pool.
            captures: Whether this is a graph capture. Until ``end_capture`` the allocator
                must not wait, so it releases no segment and queries no event.

        Raises:
            RuntimeError: Requests are already routed to that pool (torch's message).
        """
        self.use_pool(pool_id)  # before the check below can fail, as in torch
        if any(route.pool.id == pool_id for route in self._routes):
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._routes.append(_Route(self.private_pools[pool_id], takes))
        self._num_captures += captures

    def end_capture(self) -> None:
        """Record that a graph capture has ended; requests are still routed to its pool."""
        self._num_captures -= 1

    def end_pool(self, pool_id: PoolId) -> None:
        """Stop routing requests to a pool; the user that the route counted remains counted.

        Raises:
            RuntimeError: No requests are routed to that pool (torch's message).
        """
        for route in self._routes:
            if route.pool.id == pool_id:
                self._routes.remove(route)
                return
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def release_pool(self, pool_id: PoolId) -> None:
        """Count one user of a pool less; without users its segments can be released.

        The next ``empty_cache`` releases the segments that are free at that time.

        Raises:
            RuntimeError: There is no such pool (torch's message).
        """
        pool = self.private_pools.get(pool_id)
        if pool is None:
            raise RuntimeError(self.config.version.asserts.pool_exists)
        pool.use_count -= 1
        if not pool.use_count and pool_id in self._for_ooms:
            self._for_ooms.remove(pool_id)

    def routed(self, pool: Pool, stream: int) -> Pool:
        """Return the pool that serves a request on a stream: that of the newest route."""
        for route in reversed(self._routes):
            if route.takes(stream):
                return route.pool.small if pool.is_small else route.pool.large
        return pool

    def take_from_others(self, pool: Pool, size: int, stream: int) -> Block | None:
        """Take a free block for a default pool from the pools created with ``on_oom``."""
        if pool is not self.small_pool and pool is not self.large_pool:
            return None
        for pool_id in self._for_ooms:
            helper = self.private_pools[pool_id]
            found = self.take_free(
                helper.small if pool.is_small else helper.large, size, stream
            )
            if found is not None:
                return found
        return None

    def free_in_private_pools(self) -> int:
        """Return the free bytes of private pools, for the message of an OOM."""
        return sum(
            block.size
            for private in self.private_pools.values()
            for pool in (private.small, private.large)
            for block in pool.blocks()
        )

    def release_unused_pools(self, pool_id: PoolId | None = None) -> None:
        """Release the free segments of every pool without users, or of the named pool."""
        for private in list(self.private_pools.values()):
            if private.use_count or pool_id not in (None, private.id):
                continue
            release_cached(self, private.small, private.large)
            if not any(
                segment.pool in (private.small, private.large)
                for segment in self.segments()
            ):
                del self.private_pools[private.id]
