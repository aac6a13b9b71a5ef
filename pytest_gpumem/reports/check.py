"""Whether a document is a report, by ``report.schema.json`` beside this file.

What a report must have is required by the schema; a key that a later version adds is
not, so that older reports are still read.

Limits: of JSON Schema's words, those that the report's own schema uses.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.sizes import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    #: Returns where a value is wrong and how, or None.
    Check = Callable[[Any], str | None]

SCHEMA: Final = Path(__file__).parent / "report.schema.json"
#: The schema's words that are heeded, and those that say nothing about values.
WORDS: Final = frozenset(
    {
        *("$ref", "anyOf", "const", "enum", "type"),
        *("required", "properties", "additionalProperties", "propertyNames"),
        *("items", "prefixItems", "minItems", "maxItems", "minimum"),
    }
)
SILENT: Final = frozenset(("$schema", "$defs", "title", "description"))

#: How deep a value may nest that the schema does not know: far less than what Python
#: can still write.
_MAX_DEPTH: Final = 32
_NOTHING: Final[dict[str, Any]] = {}


def find_damage(report: Any) -> str | None:
    """Return where a document is no report, and why; None if it is one.

    Beside what the schema says, an integer must fit in 64 bits, a number be finite, and
    unknown keys hold what can be written again.
    """
    problem = _whole()(report)
    return None if problem is None else problem.lstrip(".")


def find_damage_of_a_test(record: Any) -> str | None:
    """Return where a test's record is none, and why; None if it is one."""
    return _test()(record)


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return schema


@cache
def _whole() -> Check:
    return _compile(_schema(), _schema()["$defs"])


@cache
def _test() -> Check:
    return _compile(_schema()["$defs"]["test"], _schema()["$defs"])


def _compile(schema: Mapping[str, Any], known: Mapping[str, Any]) -> Check:
    if "$ref" in schema:
        return _compile(known[schema["$ref"].removeprefix("#/$defs/")], known)
    if "anyOf" in schema:
        return _any_of([_compile(each, known) for each in schema["anyOf"]])
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is not None:
        return _one_of(values)
    kind = schema.get("type")
    if isinstance(kind, list):
        return _any_of([_compile({**schema, "type": each}, known) for each in kind])
    return _MAKE[kind](schema, known) if kind in _MAKE else _SIMPLE[kind]


def _any_of(checks: list[Check]) -> Check:
    def check(value: Any) -> str | None:
        problem = None
        for each in checks:
            problem = each(value)
            if problem is None:
                return None
        return problem

    return check


def _one_of(values: list[Any]) -> Check:
    def check(value: Any) -> str | None:
        if any(type(value) is type(each) and value == each for each in values):
            return None
        return _wrong(value, f"one of {', '.join(map(repr, values))}")

    return check


def _object(schema: Mapping[str, Any], known: Mapping[str, Any]) -> Check:
    required = schema.get("required", ())
    properties = {
        name: _compile(each, known)
        for name, each in schema.get("properties", _NOTHING).items()
    }
    other = _compile(schema.get("additionalProperties", _NOTHING), known)
    name_check = _compile(schema.get("propertyNames", _NOTHING), known)

    def check(value: Any) -> str | None:
        if not isinstance(value, dict):
            return _wrong(value, "an object")
        for name in required:
            if name not in value:
                return f".{name} is missing"
        for name, each in value.items():
            problem = properties.get(name, other)(each)
            if problem is not None:
                return f".{name:.60}{problem}"
            problem = name_check(name)
            if problem is not None:
                return problem
        return None

    return check


def _array(schema: Mapping[str, Any], known: Mapping[str, Any]) -> Check:
    first = [_compile(each, known) for each in schema.get("prefixItems", ())]
    rest = _compile(schema.get("items", _NOTHING), known)
    least, most = schema.get("minItems", 0), schema.get("maxItems", math.inf)

    def check(value: Any) -> str | None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            return _wrong(value, f"a list of at least {least} values")
        for index, each in enumerate(value):
            problem = (first[index] if index < len(first) else rest)(each)
            if problem is not None:
                return f"[{index}]{problem}"
        return None

    return check


def _integer(schema: Mapping[str, Any], _known: Mapping[str, Any]) -> Check:
    least = schema.get("minimum", -MAX_BYTES)

    def check(value: Any) -> str | None:
        if type(value) is int and least <= value <= MAX_BYTES:
            return None
        return _wrong(value, f"an integer from {least} on")

    return check


def _number(value: Any) -> str | None:
    if type(value) in (int, float) and math.isfinite(value):
        return None
    return _wrong(value, "a number")


def _anything(value: Any, depth: int = 0) -> str | None:
    if depth > _MAX_DEPTH:
        return " is nested too deeply"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, dict):
        value = list(value.values())
    for each in value if isinstance(value, list) else ():
        problem = _anything(each, depth + 1)
        if problem is not None:
            return problem
    return None


def _of(kind: type, name: str) -> Check:
    return lambda value: None if type(value) is kind else _wrong(value, name)


_MAKE: Final[dict[str | None, Callable[..., Check]]] = {
    "object": _object,
    "array": _array,
    "integer": _integer,
}
_SIMPLE: Final[dict[str | None, Check]] = {
    "string": _of(str, "a string"),
    "boolean": _of(bool, "true or false"),
    "null": _of(type(None), "null"),
    "number": _number,
    None: _anything,
}


def _wrong(value: Any, accepted: str) -> str:
    return f" is {value!r:.60}, accepted is {accepted}"
