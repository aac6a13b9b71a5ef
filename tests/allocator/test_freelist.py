"""The sorted list behind the pools, held to a plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.allocator import freelist
from pytest_gpumem.allocator.freelist import FreeList

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, scope="module")
def _short_chunks() -> Iterator[None]:
    """Let a few entries fill several chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freelist, "_CHUNK", 6)
        yield


def _check(entries: FreeList, plain: list[tuple[int, ...]]) -> None:
    """Every answer, at every entry, between two and beyond both ends."""
    assert plain == list(entries)
    assert len(plain) == len(entries)
    for key in range(-1, 42):
        rest = [each for each in plain if each >= (key,)]
        assert rest == list(entries.iterate_from((key,)))
        assert (rest[0] if rest else None) == entries.first_from((key,))


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60),
    descends=st.booleans(),
)
def test_it_answers_as_a_plain_sorted_list(
    steps: list[tuple[bool, int]], *, descends: bool
) -> None:
    """Whatever was put in and taken out before."""
    entries = FreeList()
    plain: list[tuple[int, ...]] = []
    for is_removed, number in steps:
        key = (2 * (20 - number if descends else number),)
        if is_removed and plain:
            gone = plain.pop(number % len(plain))
            entries.remove(gone)
        elif key not in plain:
            entries.add(key)
            plain = sorted([*plain, key])
        _check(entries, plain)


@pytest.mark.parametrize("step", [1, 210, 79])
def test_chunks_stay_short_and_in_order(step: int) -> None:
    """Each is split in half once it is too long: upwards, downwards, anywhere."""
    entries = FreeList()
    numbers = [step * number % 211 for number in range(200)]
    for count, number in enumerate(numbers):
        entries.add((number,))
        assert [(each,) for each in sorted(numbers[: count + 1])] == list(entries)

    lengths = [len(chunk) for chunk in entries._chunks]

    assert 6 >= max(lengths)
    assert 3 <= min(lengths)
    for number in numbers:
        assert (number,) == entries.first_from((number,))
        rest = sorted(each for each in numbers if each >= number)
        assert [(each,) for each in rest] == list(entries.iterate_from((number,)))
    for number in numbers:
        entries.remove((number,))
    assert 0 == len(entries)
    assert entries.first_from((0,)) is None
