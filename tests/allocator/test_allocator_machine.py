"""Whatever is done to the allocator, its invariants hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from pytest_gpumem.allocator.caching import CachingAllocator, OutOfMemory
from pytest_gpumem.allocator.config import AllocatorConfig
from pytest_gpumem.allocator.driver import Driver
from pytest_gpumem.allocator.snapshot import blocks_of

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block

MIB = 2**20
CONFS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:20",
    "expandable_segments:True,max_split_size_mb:20,garbage_collection_threshold:0.5",
    "roundup_power2_divisions:4,garbage_collection_threshold:0.5",
    "roundup_power2_divisions:[1:8,4:2,>:1]",
    "large_segment_size_mb:24,max_split_size_mb:24,max_non_split_rounding_mb:22",
    "per_process_memory_fraction:0.75,expandable_segments:True",
    "per_process_memory_fraction:0.5,garbage_collection_threshold:0.8",
)


class AllocatorMachine(RuleBasedStateMachine):
    """Any sequence of operations keeps the allocator's invariants."""

    blocks: Bundle[Block] = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = CachingAllocator(Driver(64 * MIB))
        self.live: list[Block] = []

    @initialize(conf=st.sampled_from(CONFS))
    def configure(self, conf: str) -> None:
        self.allocator = CachingAllocator(
            Driver(64 * MIB), config=AllocatorConfig.parse(conf)
        )

    @rule(
        target=blocks,
        nbytes=st.integers(1, 4096) | st.integers(1, 24 * MIB),
        stream=st.sampled_from([0, 0, 0, 7]),
        refuse=st.sampled_from([False] * 9 + [True]),
    )
    def malloc(self, nbytes: int, stream: int, refuse: bool) -> Any:  # noqa: FBT001  # hypothesis names it
        try:
            block = self.allocator.malloc(nbytes, stream, refuse=refuse)
        except OutOfMemory:
            assert refuse or self.allocator.num_ooms
            return multiple()
        assert block.size >= nbytes
        self.live.append(block)
        return block

    @rule(block=consumes(blocks))
    def free(self, block: Block) -> None:
        self.live.remove(block)
        self.allocator.free(block)

    @rule(block=blocks, stream=st.sampled_from([0, 9]))
    def use_on(self, block: Block, stream: int) -> None:
        if block in self.live:
            self.allocator.record_stream(block, stream)

    @rule(pending=st.booleans())
    def events(self, pending: bool) -> None:  # noqa: FBT001  # hypothesis names it
        self.allocator.events_pending = pending

    @rule()
    def empty_cache(self) -> None:
        self.allocator.empty_cache()

    @rule(fraction=st.sampled_from([0.5, 1.0]))
    def limit(self, fraction: float) -> None:
        self.allocator.set_memory_fraction(fraction)

    @invariant()
    def bytes_are_ordered(self) -> None:
        a = self.allocator
        assert a.allocated_bytes <= a.active_bytes <= a.reserved_bytes <= 64 * MIB
        assert a.allocated_bytes == sum(block.size for block in self.live)
        assert a.requested_bytes <= a.active_bytes
        assert a.driver.used_bytes + a.driver.free_bytes == 64 * MIB
        stats = a.memory_stats()
        assert all(
            stats[key] >= stats[key.replace(".peak", ".current")]
            for key in stats
            if key.endswith(".peak")
        )

    @invariant()
    def blocks_tile_their_segments(self) -> None:
        for segment in self.allocator.segments():
            address = segment.address
            previous = None
            for block in blocks_of(segment):
                assert address == block.address
                assert block.size % 512 == 0
                assert block.previous is previous
                if previous is not None and block.is_idle and previous.is_idle:
                    assert block.is_mapped != previous.is_mapped
                assert block.is_mapped or segment.is_expandable
                address += block.size
                previous = block
            assert address == segment.address + segment.size

    @invariant()
    def free_blocks_are_in_their_pools(self) -> None:
        a = self.allocator
        pooled = {id(b) for pool in (a.small_pool, a.large_pool) for b in pool.blocks()}
        idle = {
            id(block)
            for segment in a.segments()
            for block in blocks_of(segment)
            if block.is_idle and block.is_mapped
        }
        assert idle == pooled

    @invariant()
    def the_snapshot_adds_up(self) -> None:
        segments = self.allocator.snapshot()
        assert self.allocator.reserved_bytes == sum(s["total_size"] for s in segments)
        assert self.allocator.reserved_bytes == self.allocator.driver.used_bytes
        assert self.allocator.active_bytes == sum(s["active_size"] for s in segments)

    def teardown(self) -> None:
        for block in self.live:
            self.allocator.free(block)
        self.allocator.empty_cache()
        assert 0 == self.allocator.reserved_bytes == self.allocator.active_bytes
        assert 64 * MIB == self.allocator.driver.free_bytes


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None
)
