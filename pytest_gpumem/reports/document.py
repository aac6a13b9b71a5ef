"""A run's record: one JSON document from which every report is made.

The types of ``Report`` define its form; ``docs/report.schema.json`` is made from them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem._version import __version__
from pytest_gpumem.errors import ReportError
from pytest_gpumem.records.codec import Count, DamageError, decode, encode
from pytest_gpumem.records.record import Record
from pytest_gpumem.records.run_record import BaselineOutcome, Environment  # noqa: TC001  # the codec reads the types at run time

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

FORMAT: Final = "pytest-gpumem report"
#: Version 2 added environments, hosts, limits, and new and stale entries of a baseline.
VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Report:
    """The record of a whole run.

    Attributes:
        runs: Backend, card and budget of each run, in words; several after a merge.
        environments: The machines that tests ran on; several with workers on several
            hosts, or after a merge.
        baseline: The comparison with the baseline, or None if there was none.
        tests: The tests that used a card, by name.
        plugin: The version that wrote it.
        outcomes: How many tests ended in each way, by pytest's words, as its last line has
            them; tests without a card and the points of sweeps count too.
    """

    runs: tuple[str, ...]
    environments: tuple[Environment, ...] = ()
    baseline: BaselineOutcome | None = None
    tests: tuple[Record, ...] = ()
    plugin: str = __version__
    outcomes: dict[str, Count] = field(default_factory=dict)


def by_name(tests: Iterable[Record]) -> tuple[Record, ...]:
    """Return tests in a report's order; if several have one name, the last counts."""
    last = {each.nodeid: each for each in tests}
    return tuple(last[name] for name in sorted(last))


def to_chunks(report: Report) -> Iterator[str]:
    """Yield a report as JSON in ASCII, one test on a line."""
    head = {
        "format": FORMAT,
        "version": VERSION,
        "plugin": report.plugin,
        "runs": report.runs,
        "outcomes": report.outcomes,
        "environments": encode(report.environments),
        "baseline": encode(report.baseline),
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
        name: The name in errors.

    Raises:
        ReportError: The text is not a report, is damaged, or has a newer format.
    """
    try:
        found = json.loads(text, object_hook=_compact)
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{name} is not JSON ({error}); write it with --gpu-report=json:PATH"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ReportError(
            f"{name} is not a report of pytest-gpumem; write one with "
            "--gpu-report=json:PATH"
        )
    version = found.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise ReportError(
            f"{name} has format version {version!r}; this pytest-gpumem reads up to "
            f"{VERSION}: upgrade it"
        )
    try:
        report = decode(Report, found)
    except DamageError as error:
        raise ReportError(
            f"{name} is damaged ({str(error).lstrip('.')}); write it again with "
            "--gpu-report"
        ) from None
    return replace(report, tests=by_name(report.tests))


def read_report(path: str | os.PathLike[str]) -> Report:
    """Read a file.

    Raises:
        ReportError: As for ``parse``, or the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None
    return parse(text, str(path))


def _compact(found: dict[str, Any]) -> Any:
    """Turn a test into a record as soon as it is read, because that takes less memory."""
    if "nodeid" not in found or "figures" not in found:
        return found
    try:
        return decode(Record, found)
    except DamageError:
        return found  # decoding the whole document raises an error that names the place
