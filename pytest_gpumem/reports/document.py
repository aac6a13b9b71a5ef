"""A run's record: one JSON document that every report is made from.

Its schema is ``report.schema.json`` beside this file.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem._version import __version__
from pytest_gpumem.errors import ReportError
from pytest_gpumem.model.records import from_properties

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

FORMAT: Final = "pytest-gpumem report"
VERSION: Final = 1
_FIXTURE: Final = "gpumem.fixture."
_COMPACT: Final = (",", ":")


class Unparsed(str):
    """JSON that is written as it came: timelines are most of a report's bytes."""

    __slots__ = ()


def test_record(
    nodeid: str, outcome: str, seconds: float, properties: Iterable[tuple[str, Any]]
) -> dict[str, Any] | None:
    """Return a test's part of the document; None for a test that used no card.

    Args:
        nodeid: The test.
        outcome: ``"passed"``, ``"failed"``, ``"error"``, ``"skipped"``, ….
        seconds: How long all of its phases took.
        properties: The properties of its report.
    """
    pairs = [each for each in properties if each[0].startswith("gpumem.")]
    if not pairs:
        return None
    by_name = dict(pairs)
    return {
        "nodeid": nodeid,
        "outcome": outcome,
        "seconds": round(seconds, 4),
        "environment": str(by_name.get("gpumem.environment", "")),
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
        "broken_limit": by_name.get("gpumem.broken_limit"),
        "incident": by_name.get("gpumem.incident"),
        "sweeps": [json.loads(v) for name, v in pairs if name == "gpumem.sweep"],
        "fallbacks": [json.loads(v) for name, v in pairs if name == "gpumem.fallback"],
        "timeline": Unparsed(by_name.get("gpumem.timeline", "null")),
    }


def document(
    run: str, tests: Iterable[Mapping[str, Any]], baseline: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the whole document.

    Args:
        run: The run's device, card and budget, in words.
        tests: What ``test_record`` returned.
        baseline: The baseline's name and what differs from it, if there was one.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "plugin": __version__,
        "runs": [run],
        "tests": sorted(tests, key=lambda each: str(each["nodeid"])),
        "baseline": baseline,
    }


def _test_text(test: Mapping[str, Any]) -> str:
    timeline = test.get("timeline")
    if not isinstance(timeline, Unparsed):
        return json.dumps(test, separators=_COMPACT)
    small = {name: value for name, value in test.items() if name != "timeline"}
    return f'{json.dumps(small, separators=_COMPACT)[:-1]},"timeline":{timeline}}}'


def to_text(report: Mapping[str, Any]) -> str:
    """Return a document as JSON in ASCII, one test on a line."""
    head = {name: value for name, value in report.items() if name != "tests"}
    lines = ",\n".join(map(_test_text, report["tests"]))
    return f'{json.dumps(head, indent=2)[:-2]},\n  "tests": [\n{lines}\n  ]\n}}\n'


def parse(text: str, name: str) -> dict[str, Any]:
    """Read a document.

    Args:
        text: The JSON.
        name: What to call it in errors.

    Raises:
        ReportError: It is no report, damaged, or of a newer format.
    """
    try:
        report = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{name} is no JSON ({error}); write it with --gpu-report=json:PATH"
        ) from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ReportError(
            f"{name} is no report of pytest-gpumem; write one with "
            "--gpu-report=json:PATH"
        )
    version = report.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ReportError(
            f"{name} has format version {version!r}; this pytest-gpumem reads up to "
            f"{VERSION}: upgrade it"
        )
    from pytest_gpumem.reports.check import find_damage  # noqa: PLC0415  # a run writes only

    damage = find_damage(report)
    if damage is not None:
        raise ReportError(
            f"{name} is damaged ({damage}); write it again with --gpu-report"
        )
    return report


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file.

    Raises:
        ReportError: As for ``parse``, or it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    return parse(text, str(path))


def merge(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one document of several runs' tests; of a test in two, the later one."""
    tests: dict[str, Any] = {}
    runs: list[str] = []
    names: list[str] = []
    changes: dict[tuple[str, str], Any] = {}
    for report in reports:
        tests.update({each["nodeid"]: each for each in report["tests"]})
        runs += [each for each in report["runs"] if each not in runs]
        baseline = report.get("baseline")
        if baseline is not None:
            names += [baseline["file"]] if baseline["file"] not in names else []
            for each in baseline["changes"]:
                changes[each["test"], each["metric"]] = each
    merged = document("", tests.values(), None)
    merged["runs"] = runs
    if names:
        merged["baseline"] = {
            "file": ", ".join(names),
            "changes": list(changes.values()),
        }
    return merged


def top_figures(test: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a test's most telling figures: its call's largest, else any phase's."""
    return max(
        test["figures"],
        key=lambda each: (each["phase"] == "call", each["peak_allocated_bytes"]),
        default=None,
    )
