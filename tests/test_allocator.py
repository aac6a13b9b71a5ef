"""The allocator model's rules, by example and by invariant."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from pytest_gpumem.model.allocator import CachingAllocator, OutOfMemory
from pytest_gpumem.model.blocks import Block, round_size, segment_size
from pytest_gpumem.model.config import AllocatorConfig
from pytest_gpumem.model.driver import Driver
from pytest_gpumem.model.freelist import FreeList
from pytest_gpumem.model.oom_text import ProcessMemory, format_bytes
from pytest_gpumem.model.snapshot import blocks_of, snapshot

MIB = 2**20
PLAIN = AllocatorConfig().divisions


def _allocator(total: int = 256 * MIB, conf: str = "") -> CachingAllocator:
    return CachingAllocator(Driver(total), config=AllocatorConfig.parse(conf))


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)],
)
def test_requests_are_rounded_to_512_bytes(nbytes: int, size: int) -> None:
    """Without divisions a block is the next multiple of 512 bytes."""
    assert size == round_size(nbytes, PLAIN)


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [(1200, 1536), (2048, 2048), (2049, 2560), (3 * MIB + 1, 3 * MIB + 512 * 1024)],
)
def test_requests_are_rounded_to_power_of_two_divisions(nbytes: int, size: int) -> None:
    """With four divisions a block is the next quarter step between powers of two."""
    assert size == round_size(
        nbytes, AllocatorConfig.parse("roundup_power2_divisions:4").divisions
    )


@pytest.mark.parametrize(
    ("size", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
    ],
)
def test_segments_have_the_allocators_sizes(size: int, segment: int) -> None:
    """Small requests share 2 MiB, middling ones 20 MiB, large ones have their own."""
    assert segment == segment_size(size, 20 * MIB)


def test_a_refused_request_goes_the_whole_way() -> None:
    """Refusal flushes the cache, counts a retry and an OOM, and says the numbers."""
    allocator = _allocator()
    allocator.free(allocator.malloc(30 * MIB))
    seen = []
    allocator.on_oom.append(lambda *args: seen.append(args))

    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(1000, refuse=True)

    stats = allocator.memory_stats()
    assert (1, 1, 1) == (
        stats["num_alloc_retries"],
        stats["num_ooms"],
        stats["num_sync_all_streams"],
    )
    assert 0 == allocator.reserved_bytes
    assert [(0, 2 * MIB, 256 * MIB, 256 * MIB)] == seen
    assert "Tried to allocate 2.00 MiB." in str(caught.value)
    assert (1000, 2 * MIB, 0) == (
        caught.value.nbytes,
        caught.value.segment_bytes,
        caught.value.device_index,
    )


def test_a_refused_request_is_refused_although_a_block_is_cached() -> None:
    """A cached block that would fit does not serve a refused request."""
    allocator = _allocator()
    kept = allocator.malloc(1000)
    allocator.free(allocator.malloc(1000))

    with pytest.raises(OutOfMemory):
        allocator.malloc(1000, refuse=True)

    assert kept.is_allocated
    assert 1024 == allocator.malloc(1000).size


def test_a_limit_is_inclusive() -> None:
    """Reserved bytes may reach the limit, not pass it."""
    allocator = _allocator()
    allocator.set_memory_fraction(0.125)

    first = allocator.malloc(32 * MIB)
    with pytest.raises(OutOfMemory, match=r"32.00 MiB allowed; Of the"):
        allocator.malloc(1)

    assert 32 * MIB == first.size == allocator.limit_bytes


def test_a_fraction_of_one_is_no_limit() -> None:
    """1.0 lifts the limit; what is outside 0 to 1 is refused."""
    allocator = _allocator()
    allocator.set_memory_fraction(0.5)
    allocator.set_memory_fraction(1.0)

    assert allocator.limit_bytes is None
    with pytest.raises(ValueError, match=r"invalid fraction: 1\.5"):
        allocator.set_memory_fraction(1.5)


def test_an_absurd_request_is_refused_at_once() -> None:
    """An exabyte touches neither the cache nor the counters."""
    allocator = _allocator()

    with pytest.raises(OutOfMemory, match="more than 1EB memory"):
        allocator.malloc(2**60)

    assert 0 == allocator.num_ooms


def test_a_recorded_stream_delays_reuse() -> None:
    """A block used on another stream is allocated no more, yet still active."""
    allocator = _allocator()
    allocator.events_pending = True
    block = allocator.malloc(2 * MIB)
    allocator.record_stream(block, 7)
    allocator.free(block)
    pending = (allocator.allocated_bytes, allocator.active_bytes)
    allocator.events_pending = False
    allocator.malloc(2 * MIB)

    assert (0, 2 * MIB) == pending
    assert 2 * MIB == allocator.active_bytes


def test_other_processes_are_named() -> None:
    """The text lists who holds what of the card."""
    others = [ProcessMemory(4711, 100 * MIB), ProcessMemory(None, 0)]
    allocator = CachingAllocator(
        Driver(256 * MIB, other_bytes=100 * MIB), processes=lambda: others
    )

    with pytest.raises(
        OutOfMemory,
        match=r"156.00 MiB is free. Process 4711 has 100.00 MiB memory in use. Including "
        r"non-PyTorch memory, this process has 0 bytes memory in use. Of",
    ):
        allocator.malloc(200 * MIB)


def test_changes_can_be_traced() -> None:
    """The trace hook is told of segments and blocks, in torch's words."""
    allocator = _allocator()
    told: list[str] = []
    allocator.trace = lambda action, *_rest: told.append(action)

    allocator.free(allocator.malloc(1000))
    allocator.empty_cache()

    assert [
        "segment_alloc",
        "alloc",
        "free_requested",
        "free_completed",
        "segment_free",
    ] == told


def test_statistics_can_be_reset() -> None:
    """Peaks begin again at the current value, totals at zero."""
    allocator = _allocator()
    allocator.free(allocator.malloc(2 * MIB))
    allocator.reset_peak_stats()
    allocator.reset_accumulated_stats()
    stats = allocator.memory_stats()

    assert 0 == stats["allocated_bytes.all.peak"]
    assert 0 == stats["allocation.all.allocated"] == stats["num_device_alloc"]
    assert 20 * MIB == stats["reserved_bytes.all.peak"]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1024, "1024 bytes"),
        (1025, "1.00 KiB"),
        (MIB, "1024.00 KiB"),
        (MIB + 1, "1.00 MiB"),
        (2**30, "1024.00 MiB"),
        (2**30 + 1, "1.00 GiB"),
        (2**40, "1024.00 GiB"),
    ],
)
def test_bytes_are_written_as_the_allocator_writes_them(nbytes: int, text: str) -> None:
    """Bounds between units are inclusive, and GiB is the largest unit."""
    assert text == format_bytes(nbytes)


@pytest.mark.parametrize(
    ("text", "attribute", "value"),
    [
        ("max_split_size_mb:64", "max_split_size", 64 * MIB),
        ("max_non_split_rounding_mb:40", "max_non_split_rounding", 40 * MIB),
        ("large_segment_size_mb:64", "large_segment_size", 64 * MIB),
        ("garbage_collection_threshold:0.6", "gc_threshold", 0.6),
        ("per_process_memory_fraction:0.5", "memory_fraction", 0.5),
        ("roundup_power2_divisions:8", "divisions", (8,) * 16),
        (
            "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
            "divisions",
            (1,) * 9 + (2, 4) + (8,) * 5,
        ),
        ("backend:native, pinned_num_register_threads:4", "gc_threshold", 0.0),
    ],
)
def test_settings_are_read(text: str, attribute: str, value: object) -> None:
    """Each key of PYTORCH_CUDA_ALLOC_CONF sets its value."""
    assert value == getattr(AllocatorConfig.parse(text), attribute)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_split_size_mb:19", "must be >= 20"),
        ("garbage_collection_threshold:1.0", "above 0 and below 1"),
        ("per_process_memory_fraction:2", "between 0 and 1"),
        ("roundup_power2_divisions:3", "power of 2"),
        ("expandable_segments:true", "Expected 'True' or 'False'"),
        ("expandable_segments:True", "not modelled"),
        ("backend:cudaMallocAsync", "not modelled"),
        ("speed:11", "Unrecognized key 'speed'"),
        ("max_split_size_mb", "has no value"),
    ],
)
def test_bad_settings_are_refused(text: str, message: str) -> None:
    """What torch refuses, or the model does not know, raises at once."""
    with pytest.raises(ValueError, match=message):
        AllocatorConfig.parse(text)


def test_a_free_list_stays_sorted_over_many_chunks() -> None:
    """Insertions and removals in any order keep order and search right."""
    entries = FreeList()
    numbers = [(n * 7919) % 10007 for n in range(5000)]
    for number in numbers:
        entries.add((number,))
    for number in numbers[::2]:
        entries.remove((number,))
    kept = sorted(numbers[1::2])

    assert [(n,) for n in kept] == list(entries)
    assert len(kept) == len(entries)
    assert (kept[100],) == entries.first_from((kept[99] + 1,))
    assert entries.first_from((10**6,)) is None
    assert [(n,) for n in kept[-3:]] == list(entries.iterate_from((kept[-3],)))


class AllocatorMachine(RuleBasedStateMachine):
    """Any sequence of operations keeps the allocator's invariants."""

    blocks: Bundle[Block] = Bundle("blocks")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = _allocator(64 * MIB)
        self.live: list[Block] = []

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
                is_free = not block.is_allocated and not block.num_events
                if previous is not None and is_free:
                    assert previous.is_allocated or previous.num_events
                address += block.size
                previous = block
            assert address == segment.address + segment.size

    @invariant()
    def the_snapshot_adds_up(self) -> None:
        segments = snapshot(self.allocator)
        assert self.allocator.reserved_bytes == sum(s["total_size"] for s in segments)
        assert self.allocator.active_bytes == sum(s["active_size"] for s in segments)

    def teardown(self) -> None:
        for block in self.live:
            self.allocator.free(block)
        self.allocator.empty_cache()
        assert 0 == self.allocator.reserved_bytes == self.allocator.active_bytes


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None
)
