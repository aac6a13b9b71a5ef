"""Groups of what was live at a peak."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.records.live_groups import LiveBlock, group_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator


def bert(num_layers: int) -> Iterator[LiveBlock]:
    """Yield the weights of a model with layers of a kind."""
    yield LiveBlock(100, "s", "Bert", ("embeddings", "weight"))
    for layer in range(num_layers):
        for part, nbytes in (("attention", 10), ("output", 20)):
            path = ("encoder", "layer", str(layer), part, "weight")
            yield LiveBlock(nbytes, "s", "Bert", path)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (
            4,
            {
                "embeddings.weight of Bert": (100, 1),
                "encoder.layer.*.attention.weight of Bert": (30, 3),
                "encoder.layer.*.output.weight of Bert": (60, 3),
            },
        ),
        (
            12,
            {
                "embeddings.weight of Bert": (100, 1),
                "encoder.layer.*.attention.weight of Bert": (30, 3),
                "encoder.layer.*.output.weight of Bert": (60, 3),
            },
        ),
    ],
)
def test_layers_of_a_kind_are_one_group(
    most: int, expected: dict[str, tuple[int, int]]
) -> None:
    """Names are taken apart as far as there is room; nothing is lost."""
    groups = group_blocks(bert(3), most=most)

    assert expected == {
        each["site"]: (each["bytes"], each["blocks"]) for each in groups
    }
    assert [100, 60, 30] == [each["bytes"] for each in groups]


def test_without_room_parts_stay_together() -> None:
    """A model with many parts is told by its first names."""
    parts = [
        LiveBlock(1, "s", "M", (f"a{i}", f"b{j}")) for i in range(3) for j in range(9)
    ]

    groups = group_blocks(parts, most=5)

    assert ["a0 of M", "a1 of M", "a2 of M"] == [each["site"] for each in groups]
    assert [9, 9, 9] == [each["blocks"] for each in groups]


def test_the_largest_owners_are_named() -> None:
    """In full, layer and all; a group of one is its owner."""
    groups = group_blocks(bert(2), most=12)

    assert "largest" not in groups[0]
    assert [
        {"owner": f"encoder.layer.{layer}.output.weight of Bert", "bytes": 20}
        for layer in (0, 1)
    ] == groups[1]["largest"]


def test_the_largest_owner_is_named_first() -> None:
    """Whatever the order of the blocks."""
    blocks = [LiveBlock(n, "s", "M", ("layer", str(n), "weight")) for n in (1, 9, 4)]

    (group,) = group_blocks(blocks, most=12)

    assert [9, 4, 1] == [each["bytes"] for each in group["largest"]]


def test_sites_and_owners_share_the_room() -> None:
    """What has no owner is told by its site; what is too much is summed, exactly."""
    blocks = [
        *(LiveBlock(2, f"site {n}") for n in range(20)),
        LiveBlock(50, "s", "Linear", ("weight",)),
        LiveBlock(50, "s", "Linear", ("weight",), "gradient of"),
        LiveBlock(5, "s", "", ("weight",)),
    ]

    groups = group_blocks(blocks, most=6)

    assert [
        "gradient of weight of Linear",
        "weight of Linear",
        "weight",
        "site 0",
        "site 1",
        "site 10",
        "other sites",
    ] == [each["site"] for each in groups]
    rest = {"site": "other sites", "bytes": 34, "blocks": 17, "kind": "unnamed"}
    assert rest == groups[-1]


def test_a_name_that_ends_among_others_stays_with_them() -> None:
    """A parameter of a module whose parts have parameters too."""
    blocks = [
        LiveBlock(1, "s", "M", ("a", "weight")),
        LiveBlock(1, "s", "M", ("a",)),
    ]

    assert [("a of M", 2)] == [
        (each["site"], each["blocks"]) for each in group_blocks(blocks, most=12)
    ]


def test_little_sites_leave_their_place_to_owners() -> None:
    """What matters is told in detail."""
    blocks = [
        *(LiveBlock(1, f"site {n}") for n in range(20)),
        *(LiveBlock(1000 - n, "s", "M", (f"part{n}",)) for n in range(5)),
    ]

    groups = group_blocks(blocks, most=5)

    assert [f"part{n} of M" for n in range(5)] == [each["site"] for each in groups[:5]]
    assert 20 == groups[5]["bytes"]
