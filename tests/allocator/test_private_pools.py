"""Private pools of the allocator's model, by example and by a state machine."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from pytest_gpumem.allocator.caching import CachingAllocator, OutOfMemory
from pytest_gpumem.allocator.config import AllocatorConfig
from pytest_gpumem.allocator.driver import Driver

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block

MIB = 2**20
POOLS = ((0, 1), (1, 0), (2, 0))


def _allocator(total: int = 256 * MIB, conf: str = "") -> CachingAllocator:
    return CachingAllocator(Driver(total), config=AllocatorConfig.parse(conf))


def test_a_route_takes_its_streams_only() -> None:
    """Requests on other streams come from the default pool; the last route is asked first."""
    allocator = _allocator()
    allocator.begin_pool((1, 0), lambda stream: stream == 7)
    allocator.begin_pool((0, 1), lambda stream: stream in {7, 8})
    owners = [allocator.malloc(100, stream).segment.pool.owner for stream in (7, 8, 9)]
    allocator.end_pool((0, 1))
    owners.append(allocator.malloc(100, 7).segment.pool.owner)

    assert [(0, 1), (0, 1), (0, 0), (1, 0)] == owners


def test_a_pools_segments_go_with_its_last_user() -> None:
    """Not before, and only those that are free; the pool goes with the last of them."""
    allocator = _allocator()
    allocator.use_pool((0, 1))
    allocator.begin_pool((0, 1), lambda _stream: True)
    kept, freed = allocator.malloc(2 * MIB), allocator.malloc(30 * MIB)
    allocator.end_pool((0, 1))
    allocator.free(freed)
    reserved = []
    for _user in range(2):
        allocator.empty_cache()
        reserved.append(allocator.reserved_bytes)
        allocator.release_pool((0, 1))
    allocator.empty_cache()
    reserved.append(allocator.reserved_bytes)
    allocator.free(kept)
    assert (0, 1) in allocator.private_pools
    allocator.empty_cache()
    reserved.append(allocator.reserved_bytes)

    assert [50 * MIB, 50 * MIB, 20 * MIB, 0] == reserved
    assert {} == allocator.private_pools
    assert 50 * MIB == allocator.stats.reserved_by((0, 1)).all.peak


@pytest.mark.parametrize("on_oom", [True, False])
def test_a_pool_may_serve_where_the_driver_has_no_memory(*, on_oom: bool) -> None:
    """Only if it was created for that, and only while it has a user."""
    allocator = _allocator()
    allocator.use_pool((0, 1), on_oom=on_oom)
    allocator.begin_pool((0, 1), lambda _stream: True)
    block = allocator.malloc(100 * MIB)
    allocator.end_pool((0, 1))
    allocator.free(block)
    allocator.malloc(150 * MIB)

    allocator.release_pool((0, 1))
    with nullcontext() if on_oom else pytest.raises(OutOfMemory):
        served = allocator.malloc(100 * MIB)
        assert (0, 1) == served.segment.pool.owner
        allocator.free(served)
    allocator.release_pool((0, 1))
    assert (0, 0) == allocator.malloc(100 * MIB).segment.pool.owner


def test_a_capture_flushes_nothing() -> None:
    """An OOM in a capture leaves the cache and counts no retry; outside it does."""
    allocator = _allocator()
    allocator.free(allocator.malloc(100 * MIB))
    allocator.begin_pool((1, 0), lambda _stream: True, captures=True)
    with pytest.raises(OutOfMemory):
        allocator.malloc(200 * MIB)
    allocator.empty_cache()

    assert (100 * MIB, 0, 1) == (
        allocator.reserved_bytes,
        allocator.num_alloc_retries,
        allocator.num_ooms,
    )
    allocator.end_capture()
    allocator.end_pool((1, 0))
    allocator.malloc(200 * MIB)
    assert 1 == allocator.num_alloc_retries


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_free_blocks_are_told_of_an_oom(conf: str) -> None:
    """Free bytes of a private pool are called allocated, and named."""
    allocator = _allocator(conf=conf)
    allocator.begin_pool((1, 0), lambda _stream: True)
    allocator.free(allocator.malloc(40 * MIB))
    with pytest.raises(
        OutOfMemory,
        match="40.00 MiB is allocated by PyTorch, with 40.00 MiB allocated in private "
        r"pools \(e.g., CUDA Graphs\), and 0 bytes is reserved",
    ):
        allocator.malloc(400 * MIB)


class Pools(RuleBasedStateMachine):
    """Any order of routes, requests and releases keeps the allocator's figures."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = _allocator(64 * MIB)
        self.blocks: list[Block] = []
        self.users = dict.fromkeys(POOLS, 0)
        self.routed: list[tuple[int, int]] = []

    @rule(
        size=st.sampled_from([1, 512, 700, MIB, 2 * MIB, 12 * MIB]),
        stream=st.integers(0, 2),
    )
    def ask(self, size: int, stream: int) -> None:
        """Ask for bytes."""
        try:
            self.blocks.append(self.allocator.malloc(size, stream))
        except OutOfMemory:
            pass

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), other=st.booleans())
    def free(self, data: st.DataObject, other: bool) -> None:  # noqa: FBT001  # a strategy's
        """Free a block, which another stream may have used."""
        block = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        if other:
            self.allocator.record_stream(block, 3)
        self.allocator.free(block)

    @rule(pool=st.sampled_from(POOLS), stream=st.integers(0, 2))
    def begin(self, pool: tuple[int, int], stream: int) -> None:
        """Route a stream to a pool, where that is possible."""
        is_gone = pool in self.allocator.private_pools and not self.users[pool]
        if pool in self.routed or is_gone:
            return
        captures = pool[0] > 0
        self.allocator.begin_pool(pool, lambda each: each == stream, captures=captures)
        self.routed.append(pool)
        self.users[pool] += 1

    @precondition(lambda self: self.routed)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """End a route."""
        pool = data.draw(st.sampled_from(self.routed))
        self.routed.remove(pool)
        if pool[0]:
            self.allocator.end_capture()
        self.allocator.end_pool(pool)

    @rule(pool=st.sampled_from(POOLS))
    def release(self, pool: tuple[int, int]) -> None:
        """Give a pool up."""
        if self.users[pool] and pool not in self.routed:
            self.users[pool] -= 1
            self.allocator.release_pool(pool)

    @rule(pool=st.sampled_from([(0, 0), *POOLS]))
    def empty(self, pool: tuple[int, int]) -> None:
        """Empty all caches, or one pool's."""
        if pool == (0, 0) or not any(first for first, _second in self.routed):
            self.allocator.empty_cache(pool)

    @invariant()
    def figures_agree(self) -> None:
        """Segments, pools and statistics say the same; blocks stay in their pools."""
        allocator = self.allocator
        snapshot = allocator.snapshot()
        assert allocator.reserved_bytes == sum(each["total_size"] for each in snapshot)
        assert allocator.allocated_bytes == sum(
            each["allocated_size"] for each in snapshot
        )
        assert allocator.active_bytes == sum(each["active_size"] for each in snapshot)
        for pool in POOLS:
            held = sum(each["total_size"] for each in allocator.snapshot(pool))
            assert held == allocator.stats.reserved_by(pool).all.current
            private = allocator.private_pools.get(pool)
            assert self.users[pool] == (private.use_count if private else 0)
        free = allocator.free_in_private_pools()
        inactive = sum(
            block["size"]
            for each in snapshot
            for block in each["blocks"]
            if each["segment_pool_id"] != (0, 0) and block["state"] == "inactive"
        )
        assert free == inactive


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
