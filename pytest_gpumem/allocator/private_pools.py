"""Private pools: which requests they serve, and when their segments go back.

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
    """Requests that go to a private pool.

    Attributes:
        pool: Where to.
        takes: Whether it takes a request on a stream, which may ask the thread.
    """

    pool: PrivatePool
    takes: Callable[[int], bool]


class PrivatePools(Heap):
    """A heap with private pools beside its own.

    Attributes:
        private_pools: The pools that there are, by id.
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
        """Make a private pool, or count one more user of it.

        Args:
            pool_id: Which.
            on_oom: Whether its free blocks serve requests of the default pool that
                the driver refuses.
            splits: Whether a new pool cuts its blocks to size.

        Raises:
            RuntimeError: The pool lost its last user, but not yet its last segment
                (torch's text).
        """
        pool = self.private_pools.get(pool_id)
        if pool is None:
            self.private_pools[pool_id] = PrivatePool(pool_id, splits=splits)
        elif not pool.use_count:
            raise RuntimeError(
                "it->second->use_count > 0 INTERNAL ASSERT FAILED at "
                '"/__w/pytorch/pytorch/c10/cuda/CUDACachingAllocator.cpp":3332, please '
                "report a bug to PyTorch. "
            )
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
        """Route requests to a pool, which has one more user from then on.

        Args:
            pool_id: Which; it is made where it is not there.
            takes: Given a stream's handle, tells whether a request goes there.
            captures: Whether this is a graph's capture: until ``end_capture`` nothing
                may wait, so nothing is given back and no event is asked.

        Raises:
            RuntimeError: Requests go to that pool already (torch's text).
        """
        self.use_pool(pool_id)  # before what may fail, as torch does
        if any(route.pool.id == pool_id for route in self._routes):
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self._routes.append(_Route(self.private_pools[pool_id], takes))
        self._num_captures += captures

    def end_capture(self) -> None:
        """Note that a capture has ended; its pool still takes what is routed to it."""
        self._num_captures -= 1

    def end_pool(self, pool_id: PoolId) -> None:
        """Route no more requests to a pool; whoever began it uses it still.

        Raises:
            RuntimeError: None go there (torch's text).
        """
        for route in self._routes:
            if route.pool.id == pool_id:
                self._routes.remove(route)
                return
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def release_pool(self, pool_id: PoolId) -> None:
        """Count one user of a pool less; the last of them lets its segments go.

        They go with the next ``empty_cache``, as far as they are free then.

        Raises:
            RuntimeError: There is no such pool (torch's text).
        """
        pool = self.private_pools.get(pool_id)
        if pool is None:
            raise RuntimeError(
                "it != graph_pools.end() INTERNAL ASSERT FAILED at "
                '"/__w/pytorch/pytorch/c10/cuda/CUDACachingAllocator.cpp":3340, please '
                "report a bug to PyTorch. "
            )
        pool.use_count -= 1
        if not pool.use_count and pool_id in self._for_ooms:
            self._for_ooms.remove(pool_id)

    def routed(self, pool: Pool, stream: int) -> Pool:
        """Return the pool that serves a request on a stream: the route begun last."""
        for route in reversed(self._routes):
            if route.takes(stream):
                return route.pool.small if pool.is_small else route.pool.large
        return pool

    def take_from_others(self, pool: Pool, size: int, stream: int) -> Block | None:
        """Take a free block for a default pool from those that help on an OOM."""
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
        """Return the free bytes of private pools, as the text of an OOM has them."""
        return sum(
            block.size
            for private in self.private_pools.values()
            for pool in (private.small, private.large)
            for block in pool.blocks()
        )

    def release_unused_pools(self, pool_id: PoolId | None = None) -> None:
        """Give the free segments of pools without users back; one alone, if named."""
        for private in list(self.private_pools.values()):
            if private.use_count or pool_id not in (None, private.id):
                continue
            release_cached(self, private.small, private.large)
            if not any(
                segment.pool in (private.small, private.large)
                for segment in self.segments()
            ):
                del self.private_pools[private.id]
