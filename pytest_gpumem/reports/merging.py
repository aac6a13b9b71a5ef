"""One report of several: a run's shards, or runs on several cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpumem.reports.document import Report, by_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def merge(reports: Iterable[Report]) -> Report:
    """Return one report of several; of a test in two, the later record counts."""
    several = list(reports)
    tests = by_name(test for report in several for test in report.tests)
    baselines = [each.baseline for each in several if each.baseline is not None]
    return Report(
        runs=tuple(dict.fromkeys(run for each in several for run in each.runs)),
        environments=_distinct(each.environments for each in several),
        baseline=_baseline(baselines, {each.nodeid for each in tests}),
        tests=tests,
    )


def _distinct(groups: Iterable[Iterable[dict[str, Any]]]) -> tuple[dict[str, Any], ...]:
    found: list[dict[str, Any]] = []
    for group in groups:
        found += [each for each in group if each not in found]
    return tuple(found)


def _baseline(
    several: list[dict[str, Any]], recorded: set[str]
) -> dict[str, Any] | None:
    """Return what baselines said together.

    What one shard found stale and another one ran is not stale.
    """
    if not several:
        return None
    changes = {
        (each["test"], each["metric"]): each
        for baseline in several
        for each in baseline["changes"]
    }
    return {
        "file": ", ".join(dict.fromkeys(each["file"] for each in several)),
        "changes": list(changes.values()),
        "new": _entries(several, "new"),
        "stale": [
            each for each in _entries(several, "stale") if each["test"] not in recorded
        ],
    }


def _entries(
    several: Iterable[Mapping[str, Any]], name: str
) -> list[Mapping[str, Any]]:
    found = {
        (each["environment"], each["test"]): each
        for baseline in several
        for each in baseline[name]
    }
    return [found[key] for key in sorted(found)]
