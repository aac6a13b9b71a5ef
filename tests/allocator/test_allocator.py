"""The allocator model's rules, by example and by invariant."""

from __future__ import annotations

import pytest

from pytest_gpumem.allocator.blocks import round_size, segment_size
from pytest_gpumem.allocator.caching import CachingAllocator, OutOfMemory
from pytest_gpumem.allocator.config import AllocatorConfig
from pytest_gpumem.allocator.driver import Driver
from pytest_gpumem.allocator.oom_text import ProcessMemory
from pytest_gpumem.allocator.stats import Stat
from pytest_gpumem.allocator.versions import version_of

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
    assert "Tried to allocate 2.00 MiB." in caught.value.message
    assert (caught.value.message,) == caught.value.args
    assert (1000, 1024, 2 * MIB, 0) == (
        caught.value.nbytes,
        caught.value.rounded_bytes,
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


def test_a_limit_counts_whole_segments() -> None:
    """A request that would fit fails where its segment would not."""
    allocator = _allocator()
    allocator.set_memory_fraction(0.125)
    allocator.malloc(30 * MIB)
    allocator.malloc(512)

    with pytest.raises(OutOfMemory, match=r"Tried to allocate 20.00 MiB"):
        allocator.malloc(MIB + 1)
    assert 32 * MIB == allocator.reserved_bytes == allocator.limit_bytes

    allocator.set_memory_fraction(0.1953125)
    with pytest.raises(OutOfMemory, match=r"50.00 MiB allowed"):
        allocator.malloc(MIB + 1)


def test_a_fraction_of_one_is_no_limit() -> None:
    """1.0 lifts the limit; what is outside 0 to 1 is refused."""
    allocator = _allocator()
    allocator.set_memory_fraction(0.5)
    allocator.set_memory_fraction(1.0)

    assert allocator.limit_bytes is None
    with pytest.raises(ValueError, match=r"invalid fraction: 1\.5"):
        allocator.set_memory_fraction(1.5)


def test_a_fraction_of_one_is_named_up_to_torch_2_9() -> None:
    """Then it is a limit as any other, once it is set."""
    config = AllocatorConfig.parse("", version_of("2.9.1"))
    allocator = CachingAllocator(Driver(256 * MIB), config=config)

    allocator.set_memory_fraction(1.0)
    assert 256 * MIB == allocator.limit_bytes
    with pytest.raises(OutOfMemory, match=r"256.00 MiB allowed; Of the allocated"):
        allocator.malloc(512 * MIB)


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


def test_statistics_begin_at_nothing() -> None:
    """Each one; and what comes and goes is in both totals."""
    allocator = _allocator()
    stats = allocator.memory_stats()
    assert {0} == {stats[name] for name in stats if name != "max_split_size"}

    allocator.free(allocator.malloc(512))
    stats = allocator.memory_stats()

    assert 512 == stats["allocated_bytes.all.allocated"]
    assert 512 == stats["allocated_bytes.all.freed"]


def test_a_statistic_has_a_peak_and_two_totals() -> None:
    """They begin again on their own; the current value does not."""
    stat = Stat()
    stat.increase(5)
    stat.decrease(3)
    stat.increase(2)
    before = (stat.current, stat.peak, stat.allocated, stat.freed)
    stat.reset_peak()
    stat.reset_totals()

    assert (4, 5, 7, 3) == before
    assert (4, 4, 0, 0) == (stat.current, stat.peak, stat.allocated, stat.freed)


def test_small_and_large_blocks_have_peaks_of_their_own() -> None:
    """Each peak stays when bytes are freed, and begins again after a reset."""
    allocator = _allocator()
    names = [
        f"allocated_bytes.{pool}.peak" for pool in ("all", "small_pool", "large_pool")
    ]

    def peaks() -> list[int]:
        return [allocator.memory_stats()[name] for name in names]

    small, large = allocator.malloc(MIB), allocator.malloc(4 * MIB)
    allocator.free(small)
    allocator.free(large)
    again = allocator.malloc(MIB // 2)
    before = peaks()
    allocator.stats.reset_peak()

    assert again.size == MIB // 2
    assert [5 * MIB, MIB, 4 * MIB] == before
    assert [MIB // 2, MIB // 2, 0] == peaks()


def test_the_statistics_have_torchs_keys() -> None:
    """There are 123 keys, sorted, as in torch 2.13; max_split_size -1 is no limit."""
    stats = _allocator().memory_stats()

    assert 123 == len(stats)
    assert sorted(stats) == list(stats)
    assert -1 == stats["max_split_size"]
    assert 0 == sum(value for key, value in stats.items() if key != "max_split_size")


def test_peaks_are_plain_integers() -> None:
    """The peaks that are asked for most equal the dictionary's."""
    allocator = _allocator()
    allocator.free(allocator.malloc(3 * MIB + 1))

    assert 3 * MIB + 512 == allocator.peak_allocated_bytes
    assert 3 * MIB + 512 == allocator.peak_active_bytes
    assert 3 * MIB + 1 == allocator.peak_requested_bytes
    assert 20 * MIB == allocator.peak_reserved_bytes
    assert 0 == allocator.allocated_bytes == allocator.requested_bytes


def test_a_block_cannot_be_freed_twice() -> None:
    """The second time is an error and changes no count."""
    allocator = _allocator()
    block = allocator.malloc(1000)
    allocator.free(block)

    with pytest.raises(ValueError, match="block at 0x0 is freed a second time"):
        allocator.free(block)

    assert 0 == allocator.allocated_bytes


def test_the_oldest_segment_serves_first() -> None:
    """Of equal free blocks the one in the oldest segment wins, not the lowest."""
    driver = Driver(256 * MIB, address_policy="down")
    allocator = CachingAllocator(driver)
    older, newer = allocator.malloc(10 * MIB), allocator.malloc(10 * MIB)
    addresses = (older.address, newer.address)
    allocator.free(newer)
    allocator.free(older)

    assert addresses[0] > addresses[1]
    assert addresses[0] == allocator.malloc(10 * MIB).address


def test_the_best_fit_serves() -> None:
    """The smallest free block that is large enough is taken."""
    allocator = _allocator()
    wide, narrow = allocator.malloc(40 * MIB), allocator.malloc(30 * MIB)
    allocator.free(wide)
    allocator.free(narrow)

    assert narrow.address == allocator.malloc(30 * MIB - 1000).address


def test_a_large_block_is_not_split_for_a_mebibyte() -> None:
    """A rest of exactly 1 MiB stays with the block, and counts as allocated."""
    allocator = _allocator()

    whole = allocator.malloc(19 * MIB)
    assert 20 * MIB == whole.size
    assert 20 * MIB == allocator.allocated_bytes
    assert 19 * MIB == allocator.requested_bytes


def test_streams_do_not_share_blocks() -> None:
    """A cached block of one stream does not serve another."""
    allocator = _allocator()
    allocator.free(allocator.malloc(10 * MIB, 1))
    allocator.malloc(10 * MIB, 2)

    assert 20 * MIB == allocator.reserved_bytes


def test_a_flush_gives_pending_blocks_back() -> None:
    """Emptying the cache waits for other streams."""
    allocator = _allocator()
    allocator.events_pending = True
    block = allocator.malloc(2 * MIB)
    allocator.record_stream(block, 7)
    allocator.free(block)
    allocator.empty_cache()

    assert 0 == allocator.reserved_bytes == allocator.active_bytes


def test_an_own_stream_is_not_recorded() -> None:
    """Use on the stream of the allocation delays nothing."""
    allocator = _allocator()
    allocator.events_pending = True
    block = allocator.malloc(2 * MIB, 7)
    allocator.record_stream(block, 7)
    allocator.free(block)

    assert 0 == allocator.active_bytes


def test_an_oversize_block_serves_only_its_like() -> None:
    """From max_split_size on, blocks are not split and serve requests near them."""
    allocator = _allocator(conf="max_split_size_mb:64")
    allocator.free(allocator.malloc(100 * MIB))
    small = allocator.malloc(30 * MIB)
    near = allocator.malloc(90 * MIB)

    assert 30 * MIB == small.size
    assert 100 * MIB == near.size
    assert 130 * MIB == allocator.reserved_bytes


def test_oversize_blocks_are_given_back_before_the_flush() -> None:
    """With max_split_size, enough oversize blocks go and no retry is counted."""
    allocator = _allocator(conf="max_split_size_mb:64")
    allocator.free(allocator.malloc(30 * MIB))
    allocator.free(allocator.malloc(80 * MIB))
    allocator.free(allocator.malloc(100 * MIB))
    allocator.malloc(170 * MIB)

    assert 0 == allocator.num_alloc_retries
    assert 200 * MIB == allocator.reserved_bytes


def test_unused_blocks_are_collected_above_the_threshold() -> None:
    """Beyond the threshold of the limit, a new segment gives older blocks back."""
    allocator = _allocator(conf="garbage_collection_threshold:0.5")
    allocator.set_memory_fraction(0.75)
    allocator.free(allocator.malloc(100 * MIB))
    allocator.malloc(110 * MIB)

    assert 110 * MIB == allocator.reserved_bytes
    assert 0 == allocator.num_alloc_retries


def test_without_a_limit_no_unused_block_is_collected() -> None:
    """The threshold is a share of the limit (``set_fraction`` of ``malloc``)."""
    allocator = _allocator(conf="garbage_collection_threshold:0.5")
    allocator.free(allocator.malloc(100 * MIB))
    allocator.malloc(110 * MIB)

    assert 210 * MIB == allocator.reserved_bytes


def test_the_fraction_of_the_settings_holds_from_the_start() -> None:
    """A fraction in the settings is the limit until another one is set."""
    allocator = _allocator(conf="per_process_memory_fraction:0.25")

    assert 0.25 == allocator.memory_fraction
    assert 64 * MIB == allocator.limit_bytes


def test_a_snapshot_shows_every_block() -> None:
    """Segments have torch's keys, and blocks their states and frames."""
    allocator = _allocator()
    allocator.events_pending = True
    first, second = allocator.malloc(1000), allocator.malloc(512)
    first.frames = [{"name": "f", "filename": "a.py", "line": 3}]
    allocator.record_stream(second, 7)
    allocator.free(second)

    (segment,) = allocator.snapshot()
    blocks = segment.pop("blocks")

    assert {
        "device": 0,
        "address": 0,
        "total_size": 2 * MIB,
        "allocated_size": 1024,
        "active_size": 1536,
        "requested_size": 1512,
        "stream": 0,
        "segment_type": "small",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
    } == segment
    assert [
        (0, 1024, 1000, "active_allocated", first.frames),
        (1024, 512, 512, "active_pending_free", []),
        (1536, 2 * MIB - 1536, 0, "inactive", []),
    ] == [
        (b["address"], b["size"], b["requested_size"], b["state"], b["frames"])
        for b in blocks
    ]


def test_the_history_has_torchs_sizes() -> None:
    """Blocks are traced with the bytes asked for, an OOM with the rounded ones."""
    allocator = _allocator(8 * MIB)
    told: list[tuple[str, int, int, int]] = []
    allocator.malloc(1000)
    allocator.trace = lambda *entry: told.append(entry[:4])
    allocator.free(allocator.malloc(100, 0))
    with pytest.raises(OutOfMemory):
        allocator.malloc(30 * MIB + 1)

    assert [
        ("alloc", 1024, 100, 0),
        ("free_requested", 1024, 100, 0),
        ("free_completed", 1024, 100, 0),
        ("oom", 6 * MIB, 30 * MIB + 512, 0),
    ] == told


def test_a_free_block_keeps_what_it_was_asked_for() -> None:
    """In a snapshot, as torch shows it; the statistics count it no more."""
    allocator = _allocator()
    allocator.free(allocator.malloc(30 * MIB + 1))
    ((block,),) = [each["blocks"] for each in allocator.snapshot()]

    assert ("inactive", 30 * MIB + 1) == (block["state"], block["requested_size"])
    assert 0 == allocator.requested_bytes
