"""The output of ``compare`` for two reports or baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.baselines.baseline import (
    METRICS,
    Baseline,
    larger,
    metric_key,
    nearest,
    torch_of,
)
from pytest_gpumem.baselines.regressions import compare_figures
from pytest_gpumem.errors import ReportError
from pytest_gpumem.records.run_record import BaselineOutcome, Entry
from pytest_gpumem.reports.descriptions import environment_line, limit_words
from pytest_gpumem.sizes import format_size
from pytest_gpumem.tables import align

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_gpumem.baselines.regressions import Tolerance
    from pytest_gpumem.records.record import LimitOutcome, Record
    from pytest_gpumem.records.run_record import Change
    from pytest_gpumem.reports.document import Report

_Peaks = dict[str, dict[str, dict[str, int]]]


def compare_files(
    before: Report | Baseline,
    now: Report | Baseline,
    gate: Sequence[Tolerance],
    name: str = "",
) -> tuple[list[str], BaselineOutcome]:
    """Return the text to print, and the changes.

    Args:
        before: A report or a baseline.
        now: Another one.
        gate: The tolerances.
        name: The name of ``before`` in the changes.

    Raises:
        ReportError: They share no environment.
    """
    then, today = _peaks(before), _peaks(now)
    shared = {
        each: each if each in then else nearest(each, then) for each in sorted(today)
    }
    if not any(shared.values()) and then and today:
        raise ReportError(
            f"the files share no environment: {', '.join(sorted(then))} and "
            f"{', '.join(sorted(today))}; compare runs on the same card and PyTorch"
        )
    changes: list[Change] = []
    new: list[Entry] = []
    gone: list[Entry] = []
    same = 0
    notes: list[str] = []
    for environment, other in shared.items():
        if other is None:
            continue
        known, found = then[other], today[environment]
        if other != environment:
            notes.append(
                f"{environment} is compared with figures of torch {torch_of(other)}"
            )
        for test in sorted(found.keys() & known.keys()):
            changed = compare_figures(test, known[test], found[test], gate)
            same += not changed
            changes += changed
        new += [
            Entry(environment, test, found[test])
            for test in sorted(found.keys() - known)
        ]
        gone += [
            Entry(other, test, known[test]) for test in sorted(known.keys() - found)
        ]
    bad = sum(each.is_regression for each in changes)
    counts = {
        "the same": same,
        "new": len(new),
        "gone": len(gone),
        "beyond --fail": bad,
    }
    parts = [f"{len({each.test for each in changes})} tests changed"]
    parts += [f"{count} {word}" for word, count in counts.items() if count]
    lines = [
        *_machines(before, now),
        *notes,
        *_table(changes),
        *(f"new: {_named(each)}" for each in new),
        *(f"gone: {_named(each)}" for each in gone),
        *_limits(before, now),
        ", ".join(parts),
    ]
    return lines, BaselineOutcome(name, changes, new, gone)


def _peaks(source: Report | Baseline) -> _Peaks:
    """Return the figures of a report or a baseline, in the form of a baseline.

    Fixtures are marked as such: a test may have the same name.
    """
    peaks: _Peaks = {}
    if isinstance(source, Baseline):
        for kind, several in (("", source.peaks), (" (fixture)", source.fixtures)):
            for environment, entries in several.items():
                peaks.setdefault(environment, {}).update(
                    {f"{name}{kind}": found for name, found in entries.items()}
                )
        return peaks
    for test in source.tests:
        found = test.growth or _absolute(test)
        known = peaks.setdefault(test.environment, {})
        if found:
            known[test.nodeid] = found
        for made in test.fixture_growth:
            name = f"{made.key} (fixture)"
            known[name] = larger(known.get(name, {}), made.peaks)
    return {environment: known for environment, known in peaks.items() if known}


def _absolute(test: Record) -> dict[str, int]:
    """Return the peaks of a test whose report does not have its growth."""
    before = {"call": "", "children": "children "}
    return {
        before[each.phase] + metric_key(metric, each.device_index): each.peak(metric)
        or 0
        for each in test.of_phase(*before)
        for metric in METRICS
    }


def _named(entry: Entry) -> str:
    peaks = sorted(entry.peaks.items())
    shown = [(name, n) for name, n in peaks if name.rpartition(" ")[2] in METRICS]
    sizes = ", ".join(f"{name} {format_size(n)}" for name, n in shown)
    return f"{entry.test} ({sizes})"


def _machines(before: Report | Baseline, now: Report | Baseline) -> Iterator[str]:
    """Return the machines of the figures, if they differ."""
    if isinstance(before, Baseline) or isinstance(now, Baseline):
        return
    if before.environments == now.environments:
        return
    for word, report in (("before", before), ("now", now)):
        for each in report.environments:
            yield f"{word}: {environment_line(each)}"


def _limits(before: Report | Baseline, now: Report | Baseline) -> Iterator[str]:
    """Return the limits that hold in only one of two reports."""
    if isinstance(before, Baseline) or isinstance(now, Baseline):
        return
    then, today = _held(before), _held(now)
    for key in sorted(then.keys() & today.keys()):
        if then[key].held == today[key].held:
            continue
        (test, words), limit = key, today[key]
        verb = "holds again" if limit.held else "is broken now"
        excess = limit.measured_bytes - limit.limit_bytes
        yield (
            f"a limit {verb}: {test}: {words}: "
            f"{format_size(limit.measured_bytes)} of "
            f"{format_size(limit.limit_bytes)}"
            + (f", {format_size(excess)} too much" if excess > 0 else "")
        )


def _held(report: Report) -> dict[tuple[str, str], LimitOutcome]:
    return {
        (test.nodeid, limit_words(limit)): limit
        for test in report.tests
        for limit in test.limits
    }


def _table(changes: Iterable[Change]) -> list[str]:
    ranked = sorted(changes, key=lambda each: -abs(each.excess))
    if not ranked:
        return []
    rows = [("before", "now", "Δ", "%", "metric", "test")]
    rows += [
        (
            format_size(each.before),
            format_size(each.now),
            each.excess_text,
            f"{each.percent:+.1f}",
            each.metric + (" !" if each.is_regression else ""),
            each.test,
        )
        for each in ranked
    ]
    return align(rows, left=(4,))
