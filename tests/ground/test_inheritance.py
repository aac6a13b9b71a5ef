"""What a run's child processes are given, as a text."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_gpumem.inheritance import CHILDREN_VARIABLE, Inheritance

GIVEN = Inheritance("simulated", "/nowhere", {"card": "T4*2"}, {"": "1GiB"})


def test_settings_survive_the_environment() -> None:
    """What is written is read again; anything else is refused by name."""
    given = GIVEN._replace(rules=("load:nth=3",), visible="1,0")

    assert given == Inheritance.parse(given.text)
    for text in ("", "[]", "{}", '{"backend": 1, "more": 2}'):
        with pytest.raises(ValueError, match=f"{CHILDREN_VARIABLE} was not set by"):
            Inheritance.parse(text)


@pytest.mark.parametrize(
    ("theirs", "own", "indices"),
    [
        (None, None, [0, 1]),
        (None, "1,0", [1, 0]),
        (None, "-1", [0, 1]),
        ("3,5", "3,5", [0, 1]),
        ("3,5", "5,3", [1, 0]),
        ("GPU-a,GPU-b", "GPU-b,GPU-a", [1, 0]),
        ("3,5", "7,5", [0, 1]),
    ],
)
def test_cards_are_called_what_the_run_calls_them(
    theirs: str | None, own: str | None, indices: list[int]
) -> None:
    """A child that sees other cards, or in another order, is not mistaken."""
    assert indices == GIVEN._replace(visible=theirs).indices_here(own, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budgets", {"0": 5}),
        ("budgets", ["4GiB"]),
        ("options", {"card": None}),
        ("tenants", {"0": 5}),
        ("tenants", {"0": {"a name": 5}}),
        ("tenants", {"0": {"12": "5"}}),
        ("tenants", [{"12": 5}]),
        ("rules", "load:nth=3"),
        ("rules", [3]),
        ("visible", 0),
        ("shared", None),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any) -> None:
    """By the setting's name; a fault would otherwise come up later, in the child."""
    good = GIVEN._replace(tenants={"0": {"12": 5}})
    bad = good._replace(**{name: value})

    assert good == Inheritance.parse(good.text)
    with pytest.raises(ValueError, match=f"its '{name}' is of another type"):
        Inheritance.parse(bad.text)
