"""Groups the blocks that were live at a peak: by owner, or by site without an owner."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pytest_gpumem.records.memory_figures import Kind

#: The least number of groups by owner for which room is kept.
_FEWEST: Final = 4
#: A site with a smaller share of the bytes than this is joined with others, to make room
#: for groups by owner.
_LITTLE: Final = 0.01
#: The most owners of a group that are named.
_NAMED: Final = 3


class LiveBlock(NamedTuple):
    """A block that was live at a peak.

    Attributes:
        nbytes: Its bytes.
        site: The place that allocated it.
        model: The class of the model that owns it; empty if no owner was found.
        path: Its path in that model: ``("encoder", "layer", "3", "weight")``.
        role: Empty for the parameter or buffer itself, or ``"gradient of"``.
        kind: What its bytes are for.
    """

    nbytes: int
    site: str
    model: str = ""
    path: tuple[str, ...] = ()
    role: str = ""
    kind: Kind = "unnamed"

    @property
    def owner(self) -> str:
        """The owner in words."""
        return _words(self.role, self.path, self.model)


def group_blocks(blocks: Iterable[LiveBlock], *, most: int) -> list[dict[str, Any]]:
    """Return groups, the largest first, as values of JSON.

    At first all parts of a model are one group. Then the largest group is divided along
    the dots of its names, with similar layers together, as long as ``most`` allows.

    Args:
        blocks: The blocks.
        most: The number of groups; the rest forms one more group.
    """
    sites: dict[str, list[LiveBlock]] = {}
    owned: dict[tuple[str, ...], list[LiveBlock]] = {}
    for each in blocks:
        if each.path:
            owned.setdefault((each.role, each.model), []).append(each)
        else:
            sites.setdefault(each.site, []).append(each)
    total = sum(each.nbytes for several in (sites, owned) for each in _all(several))
    shown = sum(
        sum(each.nbytes for each in members) >= total * _LITTLE
        for members in sites.values()
    )
    room = max(most - shown, _FEWEST)
    groups = [
        *((site, members) for site, members in sites.items()),
        *(
            (_label(key, members), members)
            for key, members in _take_apart(owned, room).items()
        ),
    ]
    sized = [
        (sum(b.nbytes for b in members), text, members) for text, members in groups
    ]
    sized.sort(key=lambda each: (-each[0], each[1]))
    found = [_group(*each) for each in sized[:most]]
    rest = sized[most:]
    if rest:
        found.append(
            {
                "site": "other sites",
                "bytes": sum(nbytes for nbytes, _text, _members in rest),
                "blocks": sum(len(members) for _nbytes, _text, members in rest),
                "kind": _kind_of(each for _n, _t, members in rest for each in members),
            }
        )
    return found


def _all(groups: Mapping[Any, Sequence[LiveBlock]]) -> Iterator[LiveBlock]:
    return (each for members in groups.values() for each in members)


def _group(nbytes: int, text: str, members: Sequence[LiveBlock]) -> dict[str, Any]:
    group: dict[str, Any] = {
        "site": text,
        "bytes": nbytes,
        "blocks": len(members),
        "kind": _kind_of(members),
    }
    if members[0].path and len(members) > 1:
        largest = sorted(members, key=lambda each: -each.nbytes)
        group["largest"] = [
            {"owner": each.owner, "bytes": each.nbytes} for each in largest[:_NAMED]
        ]
    return group


def _kind_of(blocks: Iterable[LiveBlock]) -> Kind:
    """Return the kind of most of the bytes."""
    bytes_of: Counter[Kind] = Counter()
    for each in blocks:
        bytes_of[each.kind] += each.nbytes
    return max(bytes_of, key=lambda kind: bytes_of[kind])


def _take_apart(
    owned: dict[tuple[str, ...], list[LiveBlock]], room: int
) -> dict[tuple[str, ...], list[LiveBlock]]:
    """Return groups by role, model and as much of the path as ``most`` allows."""
    groups = dict(owned)
    whole: set[tuple[str, ...]] = set()
    while True:
        open_groups = groups.keys() - whole
        if not open_groups:
            return groups
        key = max(
            open_groups, key=lambda each: (sum(b.nbytes for b in groups[each]), each)
        )
        parts: dict[tuple[str, ...], list[LiveBlock]] = {}
        depth = len(key) - 2
        for block in groups[key]:
            if len(block.path) > depth:
                part = (*key, re.sub(r"^[0-9]+$", "*", block.path[depth]))
                parts.setdefault(part, []).append(block)
        is_end = sum(map(len, parts.values())) < len(groups[key])
        if is_end or len(groups) - 1 + len(parts) > room:
            whole.add(key)
        else:
            del groups[key]
            groups.update(parts)


def _label(key: tuple[str, ...], members: Sequence[LiveBlock]) -> str:
    if len(members) == 1:
        return members[0].owner
    role, model, *path = key
    return _words(role, path, model)


def _words(role: str, path: Sequence[str], model: str) -> str:
    name = ".".join(path) or "all"
    return " ".join(filter(None, (role, name, f"of {model}" if model else "")))
