"""The card's memory below the allocator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.allocator.driver import VIRTUAL_BASE, Driver
from pytest_gpumem.allocator.tenant import FixedTenant, Tenants

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class Watched(Tenants):
    """One other process, and what it is told that this one holds."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.told: list[int] = []

    def others(self) -> Sequence[tuple[int, int]]:
        return ((7, self.nbytes),)

    def hold(self, nbytes: int) -> None:
        self.told.append(nbytes)


def test_other_processes_bytes_are_not_free() -> None:
    """To the byte; they are told what this process holds, with its context."""
    driver = Driver(64 * MIB, context_bytes=3 * MIB)
    tenants = Watched(40 * MIB)
    driver.tenants.append(tenants)

    assert driver.make_context()
    assert 21 * MIB == driver.free_bytes
    assert driver.malloc(21 * MIB + 1) is None
    address = driver.malloc(21 * MIB)
    assert address is not None
    assert 0 == driver.free_bytes
    driver.free(address)

    assert [3 * MIB, 24 * MIB, 3 * MIB] == tenants.told
    assert [(7, 40 * MIB)] == driver.other_processes()


def test_a_context_is_made_once_and_stays() -> None:
    """It is nobody's before, and needs its bytes to be free."""
    driver = Driver(10 * MIB, context_bytes=4 * MIB)
    assert (10 * MIB, 0) == (driver.free_bytes, driver.process_bytes)

    assert driver.make_context()
    assert driver.make_context()
    assert (6 * MIB, 4 * MIB) == (driver.free_bytes, driver.process_bytes)


def test_a_context_without_room_is_not_made() -> None:
    """Somebody else holds the card; nothing is taken."""
    driver = Driver(10 * MIB, other_bytes=7 * MIB, context_bytes=4 * MIB)

    assert not driver.make_context()
    assert (3 * MIB, 0) == (driver.free_bytes, driver.process_bytes)


def test_processes_stand_in_the_order_in_which_they_came() -> None:
    """As NVML and an OOM's text list them; without a context this process is the last."""
    driver = Driver(64 * MIB, context_bytes=MIB)
    driver.tenants += [FixedTenant(4711, 2 * MIB), FixedTenant(12, 0)]
    assert [(4711, 2 * MIB), (None, 0)] == driver.processes()

    driver.make_context()
    driver.tenants.insert(0, FixedTenant(13, 3 * MIB))

    assert [(4711, 2 * MIB), (None, MIB), (13, 3 * MIB)] == driver.processes()
