"""Expandable segments: pages behind reserved addresses."""

from __future__ import annotations

import pytest

from pytest_gpumem.allocator.caching import CachingAllocator, OutOfMemory
from pytest_gpumem.allocator.config import AllocatorConfig
from pytest_gpumem.allocator.driver import VIRTUAL_BASE, Driver

MIB = 2**20


def _allocator(total: int = 256 * MIB, conf: str = "") -> CachingAllocator:
    text = f"expandable_segments:True,{conf}"
    return CachingAllocator(Driver(total), config=AllocatorConfig.parse(text))


def test_whole_pages_are_mapped() -> None:
    """A large request maps 20 MiB pages, a small one 2 MiB, and each is one call."""
    allocator = _allocator()
    large = allocator.malloc(30 * MIB)
    allocator.malloc(512)

    stats = allocator.memory_stats()
    assert VIRTUAL_BASE == large.address
    assert 30 * MIB == large.size
    assert 42 * MIB == allocator.reserved_bytes
    assert 2 * MIB == stats["reserved_bytes.small_pool.current"]
    assert 2 == stats["num_device_alloc"]


def test_a_segment_grows_behind_its_free_end() -> None:
    """Only what is missing is mapped, and it joins the free end before it."""
    allocator = _allocator()
    first = allocator.malloc(30 * MIB)
    second = allocator.malloc(25 * MIB)

    assert first.address + 30 * MIB == second.address
    assert 60 * MIB == allocator.reserved_bytes


def test_expandable_blocks_are_split_to_the_byte() -> None:
    """A rest of 512 bytes is split off even in the large pool."""
    allocator = _allocator()

    assert 20 * MIB - 512 == allocator.malloc(20 * MIB - 512).size


def test_expandable_blocks_are_no_segments_and_no_stuck_memory() -> None:
    """Neither segments nor inactive splits are counted."""
    allocator = _allocator()
    kept = allocator.malloc(30 * MIB)
    allocator.free(allocator.malloc(5 * MIB))

    stats = allocator.memory_stats()
    assert kept.is_allocated
    assert 0 == stats["segment.all.allocated"]
    assert 0 == stats["inactive_split.all.allocated"]
    assert 0 == stats["inactive_split_bytes.all.allocated"]


def test_a_flush_unmaps_whole_pages_only() -> None:
    """What a live block shares a page with stays mapped and free."""
    allocator = _allocator()
    kept = allocator.malloc(5 * MIB)
    allocator.free(allocator.malloc(50 * MIB))
    allocator.empty_cache()

    assert 20 * MIB == allocator.reserved_bytes
    assert [5 * MIB, 15 * MIB] == [
        block["size"] for block in allocator.snapshot()[0]["blocks"]
    ]
    assert 1 == allocator.memory_stats()["num_device_free"]
    assert kept.address + 5 * MIB == allocator.malloc(15 * MIB).address


def test_a_flush_keeps_slivers_at_both_ends() -> None:
    """A hole between two live blocks loses its inner pages."""
    allocator = _allocator()
    allocator.malloc(5 * MIB)
    hole = allocator.malloc(60 * MIB)
    allocator.malloc(5 * MIB)
    allocator.free(hole)
    allocator.empty_cache()

    lower, upper = allocator.snapshot()
    assert [5 * MIB, 15 * MIB] == [b["size"] for b in lower["blocks"]]
    assert [5 * MIB, 5 * MIB, 10 * MIB] == [b["size"] for b in upper["blocks"]]
    assert VIRTUAL_BASE + 60 * MIB == upper["address"]
    assert lower["is_expandable"]


def test_wholly_unmapped_address_space_is_given_back() -> None:
    """Without a mapped page the range goes; the next one lies elsewhere."""
    allocator = _allocator()
    allocator.free(allocator.malloc(30 * MIB))
    allocator.empty_cache()

    assert 0 == allocator.reserved_bytes
    assert [] == allocator.segments()
    assert VIRTUAL_BASE + 2**30 == allocator.malloc(30 * MIB).address


def test_holes_are_filled_from_the_lowest_address() -> None:
    """Unmapped pages between live blocks are mapped again before the end grows."""
    allocator = _allocator()
    hole = allocator.malloc(40 * MIB)
    address = hole.address
    allocator.malloc(20 * MIB)
    allocator.free(hole)
    allocator.empty_cache()

    assert address == allocator.malloc(40 * MIB).address
    assert 60 * MIB == allocator.reserved_bytes


def test_a_block_that_can_grow_is_spared() -> None:
    """A larger free block is taken before one that could grow far beyond it."""
    allocator = _allocator()
    inner = allocator.malloc(12 * MIB)
    address = inner.address
    allocator.malloc(18 * MIB)
    allocator.free(inner)

    assert 40 * MIB == allocator.reserved_bytes
    assert address == allocator.malloc(9 * MIB).address


def test_each_stream_has_addresses_of_its_own() -> None:
    """Streams do not share pages."""
    allocator = _allocator()
    allocator.free(allocator.malloc(5 * MIB, 1))
    allocator.malloc(5 * MIB, 2)

    assert 40 * MIB == allocator.reserved_bytes
    assert [1, 2] == [segment["stream"] for segment in allocator.snapshot()]


def test_a_failed_request_keeps_nothing_mapped() -> None:
    """Where the pages run out, none of the request's stays."""
    allocator = _allocator()
    with pytest.raises(OutOfMemory, match=r"Tried to allocate 300.00 MiB"):
        allocator.malloc(300 * MIB)

    assert 0 == allocator.reserved_bytes
    assert 256 * MIB == allocator.driver.free_bytes
    assert (1, 1) == (allocator.num_alloc_retries, allocator.num_ooms)


def test_a_refused_request_flushes_pages() -> None:
    """Fault injection goes the whole way here too."""
    allocator = _allocator()
    allocator.free(allocator.malloc(30 * MIB))
    with pytest.raises(OutOfMemory):
        allocator.malloc(30 * MIB, refuse=True)

    assert 0 == allocator.reserved_bytes
    assert (1, 1) == (allocator.num_alloc_retries, allocator.num_ooms)


def test_the_limit_may_be_passed_by_part_of_a_page() -> None:
    """The test counts the segment asked for, the mapping whole pages."""
    allocator = _allocator()
    allocator.set_memory_fraction(0.125)
    allocator.malloc(30 * MIB)

    assert 32 * MIB == allocator.limit_bytes
    assert 40 * MIB == allocator.reserved_bytes


def test_pages_have_the_size_of_large_segments() -> None:
    """large_segment_size_mb decides how much is mapped at once."""
    allocator = _allocator(conf="large_segment_size_mb:64")
    allocator.malloc(30 * MIB)

    assert 64 * MIB == allocator.reserved_bytes


def test_pages_are_traced() -> None:
    """Mapping and unmapping are told in torch's words."""
    allocator = _allocator()
    told: list[tuple[str, int, int, int]] = []
    allocator.trace = lambda *entry: told.append(entry[:4])
    allocator.free(allocator.malloc(30 * MIB))
    allocator.empty_cache()

    assert ("segment_map", VIRTUAL_BASE, 40 * MIB, 0) == told[0]
    assert ("segment_unmap", VIRTUAL_BASE, 40 * MIB, 0) == told[-1]
