"""What fuzz tests share: any JSON, documents with one thing wrong, settings."""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Examples of each property; set the variable to look for longer.
EXAMPLES: Final = int(os.environ.get("PYTEST_GPUMEM_FUZZ_EXAMPLES", "150"))

#: Of a test that may use ``tmp_path``: every example writes the file anew.
fuzz: Final = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
    ],
)

#: Any text, lone surrogates too: file names in another encoding have them.
texts: Final = st.text(
    st.characters(codec=None) | st.sampled_from("\udc80\u2028\x00²٣<"), max_size=30
)


def _fits_the_environment(text: str) -> bool:
    try:
        return b"\x00" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


#: Any text that a variable of the environment can hold.
variables: Final = texts.filter(_fits_the_environment)

_numbers: Final = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63), 10**400]),
    st.floats(),
)

#: Anything that Python's JSON can hold.
json_values: Final[st.SearchStrategy[Any]] = st.recursive(
    st.none() | st.booleans() | _numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=8,
)


class Spot(NamedTuple):
    """A place in a document: the object or list, and the key or index in it."""

    path: tuple[str | int, ...]
    key: str | int


def _spots(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[Spot]:
    """Yield every place; of a long list only its ends."""
    if isinstance(value, dict):
        keys: list[str | int] = list(value)
    elif isinstance(value, list):
        keys = [*range(len(value))]
        keys = keys if len(keys) <= 4 else [*keys[:3], keys[-1]]  # both ends
    else:
        return
    for key in keys:
        yield Spot(path, key)
        yield from _spots(value[key], (*path, key))


@st.composite
def broken(draw: st.DrawFn, document: Any) -> Any:
    """Return a copy of a JSON document in which one or two things are otherwise."""
    changed = copy.deepcopy(document)
    for _change in range(draw(st.integers(1, 2))):
        spots = [*_spots(changed)]
        if not spots:
            return draw(json_values)
        spot = draw(st.sampled_from(spots))
        holder = changed
        for key in spot.path:
            holder = holder[key]
        how = draw(st.sampled_from(("drop", "alter", "twice")))
        if how == "drop":
            del holder[spot.key]
        elif how == "alter" or isinstance(holder, dict):
            holder[spot.key] = draw(json_values)
        else:
            holder.append(copy.deepcopy(holder[spot.key]))
    return changed


@st.composite
def cut(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes with the end missing, a piece gone, or some replaced."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.sampled_from([len(content), min(start + 1, len(content)), start]))
    return content[:start] + draw(st.binary(max_size=8)) + content[end:]


#: JSON that is nested more deeply than Python follows.
NESTED: Final = (b"[" * 10**5, b'{"format":' * 10**5)


def files(document: Any) -> st.SearchStrategy[bytes]:
    """Return a strategy for any bytes, any JSON, and the document with something wrong."""
    good = json.dumps(document).encode()
    return st.one_of(
        st.binary(max_size=60),
        json_values.map(lambda value: json.dumps(value).encode()),
        broken(document).map(lambda value: json.dumps(value).encode()),
        cut(good),
        st.sampled_from(
            [*NESTED, good, good.decode().encode("utf-16"), b"\xff" + good]
        ),
    )
