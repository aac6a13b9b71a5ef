"""Columns of plain text stand below each other."""

from __future__ import annotations

from pytest_gpumem.tables import align


def test_columns_end_in_line_and_the_last_begins() -> None:
    """The last one is not padded, so no line ends in blanks."""
    assert ["  a  bbb  c", "aaa    b  cc"] == align(
        [("a", "bbb", "c"), ("aaa", "b", "cc")]
    )


def test_a_column_may_begin_in_line() -> None:
    """As words do better than figures."""
    assert ["a    b  c", "aaa  b  c"] == align(
        [("a", "b", "c"), ("aaa", "b", "c")], left=(0,)
    )
