"""Merges the reports of a run's shards, or of runs on several cards."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_gpumem.records.run_record import BaselineOutcome
from pytest_gpumem.reports.document import Report, by_name

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.records.run_record import Entry, Environment


def merge(reports: Iterable[Report]) -> Report:
    """Merge several reports; if two have a test, the later record counts."""
    several = list(reports)
    tests = by_name(test for report in several for test in report.tests)
    outcomes: Counter[str] = Counter()
    for each in several:
        outcomes.update(each.outcomes)
    baselines = [each.baseline for each in several if each.baseline is not None]
    return Report(
        runs=tuple(dict.fromkeys(run for each in several for run in each.runs)),
        environments=_distinct(each.environments for each in several),
        baseline=_baseline(baselines, {each.nodeid for each in tests}),
        tests=tests,
        outcomes=dict(outcomes),
    )


def _distinct(groups: Iterable[Iterable[Environment]]) -> tuple[Environment, ...]:
    return tuple(dict.fromkeys(each for group in groups for each in group))


def _baseline(
    several: list[BaselineOutcome], recorded: set[str]
) -> BaselineOutcome | None:
    """Merge the comparisons with baselines.

    A test is not stale if any shard ran it.
    """
    if not several:
        return None
    changes = {
        (each.test, each.metric): each for one in several for each in one.changes
    }
    stale = _entries(each for one in several for each in one.stale)
    return BaselineOutcome(
        ", ".join(dict.fromkeys(each.file for each in several)),
        list(changes.values()),
        _entries(each for one in several for each in one.new),
        [each for each in stale if each.test not in recorded],
    )


def _entries(entries: Iterable[Entry]) -> list[Entry]:
    found = {(each.environment, each.test): each for each in entries}
    return [found[key] for key in sorted(found)]
