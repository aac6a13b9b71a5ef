"""Converts records to and from values of JSON, by the types of their fields.

Only these types define the form of a document: documents are checked against them when
they are read, and the published schema is made from them. A field that an older document
lacks takes its default; a key that this version does not know is ignored.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Final,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pytest_gpumem.sizes import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    #: Converts a value of JSON to a value of the type, or raises ``DamageError``.
    Decoder = Callable[[Any], Any]

_T = TypeVar("_T")
COMPACT: Final = (",", ":")


@dataclass(frozen=True)
class AtLeast:
    """The smallest value of an integer; used in ``Annotated``."""

    least: int


@dataclass(frozen=True)
class AsText:
    """A large field that is kept as JSON text of a type; used in ``Annotated``."""

    type: Any


#: A number of bytes or things.
Count = Annotated[int, AtLeast(0)]


class DamageError(ValueError):
    """A value has the wrong type; the text begins with its place in the document."""


def decode(kind: type[_T], value: Any) -> _T:
    """Return the record of a value of JSON.

    Args:
        kind: A dataclass of the records.
        value: The value that ``json.loads`` returned.

    Raises:
        DamageError: The value, or a value inside it, has another type.
    """
    hashable: Any = kind
    decoded: _T = decoder(hashable)(value)
    return decoded


def encode(value: Any) -> Any:
    """Return a record, or lists and dictionaries of records, as values of JSON."""
    if is_dataclass(value):
        return {each.name: encode(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, (list, tuple)):
        return [encode(each) for each in value]
    if isinstance(value, dict):
        return {encode(name): encode(each) for name, each in value.items()}
    return value.value if isinstance(value, Enum) else value


@cache
def hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    return get_type_hints(kind, include_extras=True)


@cache
def decoder(kind: Any) -> Decoder:
    """Return the function that decodes values of a type."""
    origin = get_origin(kind)
    if origin in _COMPOSED:
        return _COMPOSED[origin](get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        choice = _one_of(tuple(each.value for each in kind))
        return lambda value: kind(choice(value))
    return _record(kind) if is_dataclass(kind) else _SIMPLE[kind]


def _annotated(arguments: tuple[Any, ...]) -> Decoder:
    note = arguments[1]
    if isinstance(note, AsText):
        inner = decoder(note.type)
        return lambda value: json.dumps(encode(inner(value)), separators=COMPACT)
    return _integer(note.least)


def _one_of(values: tuple[Any, ...]) -> Decoder:
    def decode_choice(value: Any) -> Any:
        if any(type(value) is type(each) and value == each for each in values):
            return value
        raise _wrong(value, f"one of {', '.join(map(repr, values))}")

    return decode_choice


def _any_of(kinds: tuple[Any, ...]) -> Decoder:
    decoders = [decoder(each) for each in kinds]

    def decode_any(value: Any) -> Any:
        damage = None
        for each in decoders:
            try:
                return each(value)
            except DamageError as error:  # noqa: PERF203  # another type may accept it
                damage = damage or error
        raise damage or _wrong(value, "nothing")

    return decode_any


def _mapping(kinds: tuple[Any, ...]) -> Decoder:
    name, item = (decoder(each) for each in kinds)

    def decode_mapping(value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise _wrong(value, "an object")
        return {
            name(key): _inside(f".{key}"[:60], item, each)
            for key, each in value.items()
        }

    return decode_mapping


def _list(kinds: tuple[Any, ...]) -> Decoder:
    item = decoder(kinds[0])

    def decode_list(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise _wrong(value, "a list")
        found: list[Any] = []
        try:  # one try block for all values, because a timeline has hundreds
            found.extend(map(item, value))
        except DamageError as error:
            raise DamageError(f"[{len(found)}]{error}") from None
        return found

    return decode_list


def _tuple(kinds: tuple[Any, ...]) -> Decoder:
    items = [decoder(each) for each in kinds if each is not ...]
    if len(items) < len(kinds):
        several = _list(kinds)
        return lambda value: tuple(several(value))

    def decode_row(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) != len(items):
            raise _wrong(value, f"a list of {len(items)} values")
        found: list[Any] = []
        try:
            for item, each in zip(items, value, strict=True):
                found.append(item(each))
        except DamageError as error:
            raise DamageError(f"[{len(found)}]{error}") from None
        return tuple(found)

    return decode_row


def _record(kind: Any) -> Decoder:
    decoders = {
        name: decoder(each)
        for name, each in hints(kind).items()
        if name in _names(kind)
    }
    required = required_of(kind)

    def decode_record(value: Any) -> Any:
        if type(value) is kind:
            return value  # it was decoded before
        if not isinstance(value, dict):
            raise _wrong(value, "an object")
        for name in required:
            if name not in value:
                raise DamageError(f".{name} is missing")
        return kind(
            **{
                name: _inside(f".{name}", each, value[name])
                for name, each in decoders.items()
                if name in value
            }
        )

    return decode_record


def _names(kind: Any) -> set[str]:
    return {each.name for each in fields(kind)}


def required_of(kind: Any) -> list[str]:
    """Return the fields that a document must have: those without a default."""
    return [
        each.name
        for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    ]


def _inside(where: str, item: Decoder, value: Any) -> Any:
    try:
        return item(value)
    except DamageError as error:
        raise DamageError(f"{where}{error}") from None


def _integer(least: int) -> Decoder:
    def decode_integer(value: Any) -> int:
        if type(value) is int and least <= value <= MAX_BYTES:
            return value
        raise _wrong(value, f"an integer from {least} on")

    return decode_integer


def _number(value: Any) -> Any:
    if type(value) in (int, float) and abs(value) <= MAX_BYTES and math.isfinite(value):
        return value
    raise _wrong(value, "a number")


def _of(kind: type, name: str) -> Decoder:
    def decode_simple(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise _wrong(value, name)

    return decode_simple


_SIMPLE: Final[dict[Any, Decoder]] = {
    int: _integer(-MAX_BYTES),
    float: _number,
    str: _of(str, "a string"),
    bool: _of(bool, "true or false"),
    type(None): _of(type(None), "null"),
}

_COMPOSED: Final[dict[Any, Callable[[tuple[Any, ...]], Decoder]]] = {
    Annotated: _annotated,
    Literal: _one_of,
    Union: _any_of,
    types.UnionType: _any_of,
    dict: _mapping,
    list: _list,
    tuple: _tuple,
}


def _wrong(value: Any, accepted: str) -> DamageError:
    return DamageError(f" is {value!r:.60}, accepted is {accepted}")
