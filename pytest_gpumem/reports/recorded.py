"""A test's part of a report, kept as compact text: a run may have ten thousand."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.records.memory import from_properties

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_FIXTURE: Final = "gpumem.fixture."
COMPACT: Final = (",", ":")
#: What a record of an earlier format lacks.
_SINCE_2: Final[dict[str, Any]] = {
    "host": "",
    "limits": [],
    "unknown": None,
    "waited_s": 0.0,
    "contention": None,
    "growth": {},
    "fixture_growth": [],
}


class RecordedTest(NamedTuple):
    """A test's record as JSON in ASCII, its timeline apart: that is most of it.

    Attributes:
        nodeid: The test.
        head: The record without its timeline.
        timeline: The timeline.
    """

    nodeid: str
    head: str
    timeline: str

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RecordedTest:
        """Return a record's text; what an earlier format lacks is filled in."""
        timeline = json.dumps(record.get("timeline"), separators=COMPACT)
        return cls.apart(record, timeline)

    @classmethod
    def apart(cls, record: Mapping[str, Any], timeline: str) -> RecordedTest:
        """Return a record's text, with a timeline that is text already."""
        head = filled(record)
        head.pop("timeline", None)
        return cls(record["nodeid"], json.dumps(head, separators=COMPACT), timeline)

    @property
    def text(self) -> str:
        """The whole record as JSON, on one line."""
        return f'{self.head[:-1]},"timeline":{self.timeline}}}'

    def record(self) -> dict[str, Any]:
        """Return the record without its timeline."""
        found: dict[str, Any] = json.loads(self.head)
        return found


def filled(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with what one of an earlier format lacks."""
    return {**_SINCE_2, **record}


def test_record(
    nodeid: str, outcome: str, seconds: float, properties: Iterable[tuple[str, Any]]
) -> RecordedTest | None:
    """Return a test's part of the report; None for a test that used no card.

    Args:
        nodeid: The test.
        outcome: ``"passed"``, ``"failed"``, ``"error"``, ``"skipped"``.
        seconds: How long all of its phases took.
        properties: The properties of its report.
    """
    pairs = [each for each in properties if each[0].startswith("gpumem.")]
    if not pairs:
        return None
    by_name = dict(pairs)
    record = {
        "nodeid": nodeid,
        "outcome": outcome,
        "seconds": round(seconds, 4),
        "environment": str(by_name.get("gpumem.environment", "")),
        "host": str(by_name.get("gpumem.host", "")),
        "figures": [
            {"phase": phase, **asdict(each)}
            for (phase, _index), each in from_properties(by_name).items()
        ],
        "fixtures": [
            {"scope": scope, "name": fixture, "bytes": int(value)}
            for name, value in pairs
            if name.startswith(_FIXTURE)
            for scope, _dot, fixture in [name.removeprefix(_FIXTURE).partition(".")]
        ],
        "growth": json.loads(by_name.get("gpumem.growth", "{}")).get("peaks", {}),
        "fixture_growth": [
            json.loads(value)
            for name, value in pairs
            if name == "gpumem.fixture_growth"
        ],
        "limits": json.loads(by_name.get("gpumem.limits", "[]")),
        "unknown": by_name.get("gpumem.unknown"),
        "waited_s": float(by_name.get("gpumem.waited_s", 0)),
        "contention": json.loads(by_name.get("gpumem.contention", "null")),
        "broken_limit": by_name.get("gpumem.broken_limit"),
        "incident": by_name.get("gpumem.incident"),
        "sweeps": [json.loads(v) for name, v in pairs if name == "gpumem.sweep"],
        "fallbacks": [json.loads(v) for name, v in pairs if name == "gpumem.fallback"],
    }
    return RecordedTest.apart(record, by_name.get("gpumem.timeline", "null"))


def top_figures(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a test's most telling figures: its call's largest, else any phase's."""
    return max(
        record["figures"],
        key=lambda each: (each["phase"] == "call", each["peak_allocated_bytes"]),
        default=None,
    )
