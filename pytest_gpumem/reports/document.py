"""A run's record: one JSON document that every report is made from.

Its schema is ``report.schema.json`` beside this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem._version import __version__
from pytest_gpumem.errors import ReportError
from pytest_gpumem.reports.recorded import RecordedTest, filled

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

FORMAT: Final = "pytest-gpumem report"
#: 2 brought environments, hosts, limits, and what is new or stale in a baseline.
VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Report:
    """What a run recorded.

    Attributes:
        runs: Each run's device, card and budget, in words.
        environments: The machines that tests ran on, as ``devices.facts_of`` has them.
        baseline: The baseline's name, what differs from it, what is new in this run and
            what is stale in the file; None if there was none.
        tests: The tests that used a card, by name.
        plugin: The version that wrote it.
    """

    runs: tuple[str, ...] = ()
    environments: tuple[dict[str, Any], ...] = ()
    baseline: dict[str, Any] | None = None
    tests: tuple[RecordedTest, ...] = ()
    plugin: str = __version__


def by_name(tests: Iterable[RecordedTest]) -> tuple[RecordedTest, ...]:
    """Return tests in a report's order; of several of one name, the last."""
    last = {each.nodeid: each for each in tests}
    return tuple(last[name] for name in sorted(last))


def to_chunks(report: Report) -> Iterator[str]:
    """Yield a report as JSON in ASCII, one test on a line."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "plugin": report.plugin,
        "runs": report.runs,
        "environments": report.environments,
        "baseline": report.baseline,
    }
    yield f'{json.dumps(head, indent=2)[:-2]},\n  "tests": ['
    comma = ""
    for each in report.tests:
        yield f"{comma}\n{each.text}"
        comma = ","
    yield "\n  ]\n}\n"


def to_text(report: Report) -> str:
    """Return a report as JSON."""
    return "".join(to_chunks(report))


def parse(text: str, name: str) -> Report:
    """Read a document of this format or an earlier one.

    Args:
        text: The JSON.
        name: What to call it in errors.

    Raises:
        ReportError: It is no report, damaged, or of a newer format.
    """
    try:
        found = json.loads(text, object_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{name} is no JSON ({error}); write it with --gpu-report=json:PATH"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ReportError(
            f"{name} is no report of pytest-gpumem; write one with "
            "--gpu-report=json:PATH"
        )
    version = found.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ReportError(
            f"{name} has format version {version!r}; this pytest-gpumem reads up to "
            f"{VERSION}: upgrade it"
        )
    from pytest_gpumem.reports.check import find_damage  # noqa: PLC0415  # a run writes only

    head, tests = _since_2(found), found.get("tests")
    whole = isinstance(tests, list) and all(
        type(each) is RecordedTest for each in tests
    )
    damage = find_damage({**head, "tests": [] if whole else tests})
    if damage is not None:
        raise ReportError(
            f"{name} is damaged ({damage}); write it again with --gpu-report"
        )
    return Report(
        tuple(head["runs"]),
        tuple(head["environments"]),
        head["baseline"],
        by_name(found["tests"]),
        head["plugin"],
    )


def read(path: str | os.PathLike[str]) -> Report:
    """Read a file.

    Raises:
        ReportError: As for ``parse``, or it cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    return parse(text, str(path))


def _since_2(found: dict[str, Any]) -> dict[str, Any]:
    """Return a report's head with what an earlier format lacks."""
    head = {**found, "version": VERSION}
    head.setdefault("environments", [])
    if isinstance(head.get("baseline"), dict):
        head["baseline"] = {"new": [], "stale": [], **head["baseline"]}
    return head


def _compact(found: dict[str, Any]) -> Any:
    """Keep a test as text as soon as it is read: it is far smaller so."""
    if "nodeid" not in found or "figures" not in found:
        return found
    from pytest_gpumem.reports.check import find_damage_of_a_test  # noqa: PLC0415  # a run writes only

    record = filled(found)
    return found if find_damage_of_a_test(record) else RecordedTest.of(record)
