"""The card's memory below the allocator, and the sorted list of free blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.model.driver import VIRTUAL_BASE, Driver
from pytest_gpumem.model.freelist import FreeList

MIB = 2**20


def test_the_lowest_gap_that_fits_is_used() -> None:
    """Freed ranges are joined and used again, the lowest one first."""
    driver = Driver(64 * MIB)
    a, b, c = (driver.malloc(4 * MIB) for _ in range(3))
    assert (0, 4 * MIB, 8 * MIB) == (a, b, c)
    driver.free(0)
    driver.free(4 * MIB)

    assert 12 * MIB == driver.malloc(10 * MIB)
    assert 0 == driver.malloc(8 * MIB)


def test_descending_addresses_are_never_used_again() -> None:
    """The other policy hands out ever lower addresses."""
    driver = Driver(64 * MIB, address_policy="down")
    first = driver.malloc(4 * MIB)
    assert first is not None
    driver.free(first)

    assert first - 4 * MIB == driver.malloc(4 * MIB)


def test_an_unknown_address_policy_is_refused() -> None:
    """Only the two policies are known."""
    with pytest.raises(
        ValueError, match="address_policy='up'; accepted are 'firstfit'"
    ):
        Driver(MIB, address_policy="up")


def test_free_bytes_are_what_nobody_holds() -> None:
    """Others, this process and a cap each take their part; never below 0."""
    driver = Driver(64 * MIB, other_bytes=10 * MIB)
    driver.malloc(4 * MIB)
    assert 50 * MIB == driver.free_bytes
    driver.free_cap = lambda: 7 * MIB
    assert 7 * MIB == driver.free_bytes
    assert driver.malloc(8 * MIB) is None
    driver.free_cap = lambda: -1

    assert 0 == driver.free_bytes


def test_all_of_the_card_can_be_had() -> None:
    """The last byte can be had, one more cannot."""
    driver = Driver(4 * MIB)

    assert driver.malloc(4 * MIB + 1) is None
    assert 0 == driver.malloc(4 * MIB)
    assert driver.malloc(1) is None


def test_pages_are_had_all_or_none() -> None:
    """Where one page is missing, those created for the request go back."""
    driver = Driver(10 * MIB)
    driver.calls = []
    assert not driver.map_pages(6, 2 * MIB)
    assert 10 * MIB == driver.free_bytes
    assert driver.map_pages(5, 2 * MIB)
    driver.unmap_pages(2, 2 * MIB)

    assert 4 * MIB == driver.free_bytes
    assert [
        ("cuMemCreate", 2 * MIB, 0, 5),
        ("cuMemCreate", 2 * MIB, 2, 1),
        ("physFree", 2 * MIB, 0, 5),
        ("cuMemCreate", 2 * MIB, 0, 5),
        ("cuMemMap", 2 * MIB, 0, 5),
        ("cuMemUnmap", 2 * MIB, 0, 1),
        ("physFree", 2 * MIB, 0, 1),
        ("cuMemUnmap", 2 * MIB, 0, 1),
        ("physFree", 2 * MIB, 0, 1),
    ] == driver.calls


def test_address_space_costs_no_memory() -> None:
    """Reserved ranges lie far away, a GiB apart, and hold no bytes."""
    driver = Driver(10 * MIB)

    assert VIRTUAL_BASE == driver.reserve(12 * MIB)
    assert VIRTUAL_BASE + 2**30 == driver.reserve(12 * MIB)
    assert 10 * MIB == driver.free_bytes


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


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 300)), max_size=60))
def test_a_free_list_is_a_sorted_set(steps: list[tuple[bool, int]]) -> None:
    """Whatever is added and removed, order and search are those of a sorted list."""
    entries = FreeList()
    model: set[int] = set()
    for is_added, number in steps:
        if is_added and number not in model:
            entries.add((number,))
            model.add(number)
        elif not is_added and number in model:
            entries.remove((number,))
            model.discard(number)

    assert [(n,) for n in sorted(model)] == list(entries)
    assert min(((n,) for n in model if n >= 150), default=None) == entries.first_from(
        (150,)
    )
