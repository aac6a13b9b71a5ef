"""The JSON Schema of reports, from the types of the records and what they say of themselves."""

from __future__ import annotations

import json
import types
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from generators.docstrings import read
from pytest_gpumem.records.codec import AsText, hints, required_of
from pytest_gpumem.reports.document import FORMAT, VERSION, Report

_SIMPLE: Final = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def report_schema() -> str:
    """Return the schema's text."""
    known: dict[str, Any] = {}
    report = _object(Report, known)
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pytest-gpumem report",
        "description": "What --gpu-report=json:PATH writes. Sizes are bytes. New keys may "
        "come without a new version.",
        "type": "object",
        "required": ["format", "version", *report["required"]],
        "properties": {
            "format": {"const": FORMAT},
            "version": {"const": VERSION},
            **report["properties"],
        },
        "$defs": dict(sorted(known.items())),
    }
    return json.dumps(schema, indent=2) + "\n"


def _object(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    said = {
        name: text
        for base in kind.__mro__
        for name, text in read(base).entries("Attributes")
    }
    properties = {}
    for each in fields(kind):
        properties[each.name] = _schema(hints(kind)[each.name], known)
        if each.name in said:
            text = " ".join(said[each.name].split())
            properties[each.name]["description"] = text.replace("``", "").replace(
                "None", "null"
            )
    found: dict[str, Any] = {"type": "object", "required": required_of(kind)}
    return {**found, "properties": properties}


def _schema(kind: Any, known: dict[str, Any]) -> dict[str, Any]:  # noqa: C901, PLR0911  # one for each kind of type
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        note = arguments[1]
        if isinstance(note, AsText):
            return _schema(note.type, known)
        return {"type": "integer", "minimum": note.least}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(each, known) for each in arguments]}
    if origin is dict:
        name, item = arguments
        found = {"type": "object", "additionalProperties": _schema(item, known)}
        if name is not str:
            found["propertyNames"] = _schema(name, known)
        return found
    if origin is list or (origin is tuple and arguments[-1] is ...):
        return {"type": "array", "items": _schema(arguments[0], known)}
    if origin is tuple:
        items = [_schema(each, known) for each in arguments]
        size = {"minItems": len(items), "maxItems": len(items)}
        return {"type": "array", "prefixItems": items, **size}
    if is_dataclass(kind):
        return _reference(kind, known)
    if issubclass(kind, Enum):
        return {"enum": [each.value for each in kind]}
    return {"type": _SIMPLE[kind]}


def _reference(kind: Any, known: dict[str, Any]) -> dict[str, Any]:
    name: str = kind.__name__
    if name not in known:
        known[name] = {}  # it may contain itself
        known[name] = _object(kind, known)
    return {"$ref": f"#/$defs/{name}"}
