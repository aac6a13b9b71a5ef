"""A record as properties of a test's case in JUnit's XML: ``gpumem.NAME``."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.records.codec import COMPACT, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.records.record import Record

#: Fields that are left out, because pytest reports them itself or they are too large.
_NOT_SHOWN: Final = ("nodeid", "outcome", "seconds", "timeline", "judgement")
#: Properties with a name that differs from the field's name.
_NAMES: Final = {
    "fallbacks": "fallback",
    "max_vram_bytes": "max_vram",
    "smallest_budget_bytes": "smallest_budget",
    "sweeps": "sweep",
}
#: Lists that become one property for each element.
_APART: Final = ("fallbacks", "fixture_growth", "sweeps")


def properties(record: Record) -> list[tuple[str, Any]]:
    """Return a test's properties; unknown and empty fields are left out."""
    return [(f"gpumem.{name}", value) for name, value in _properties(record)]


def _properties(record: Record) -> Iterator[tuple[str, Any]]:
    for each in fields(record):
        value = getattr(record, each.name)
        if each.name in _NOT_SHOWN or value in (None, "", 0, [], {}):
            continue
        name = _NAMES.get(each.name, each.name)
        if each.name == "figures":
            yield from _figures(record)
        elif each.name == "fixtures":
            for made in value:
                yield f"fixture.{made.scope}.{made.name}", made.bytes
        elif each.name == "growth":
            judgement = encode(record.judgement) or {}
            found = {key: told for key, told in judgement.items() if told}
            yield name, _text({"peaks": value, **found})
        elif each.name == "broken_limit":
            yield "over_limit", 1
            yield name, value
        elif each.name in _APART:
            yield from ((name, _text(part)) for part in value)
        elif each.name == "waited_s":
            yield name, f"{value:.2f}"
        else:
            yield name, value if isinstance(value, (int, str)) else _text(value)


def _figures(record: Record) -> Iterator[tuple[str, int]]:
    for each in record.figures:
        values = encode(each)
        prefix = f"{values.pop('phase')}.cuda{values.pop('device_index')}"
        for name, value in values.items():
            if value is not None:
                yield f"{prefix}.{name}", value


def _text(value: Any) -> str:
    return json.dumps(encode(value), separators=COMPACT)
