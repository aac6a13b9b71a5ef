"""The commands on reports and baselines: ``report``, ``merge``, ``compare``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.errors import ReportError
from pytest_gpumem.files import write_atomically

if TYPE_CHECKING:
    import argparse

    from pytest_gpumem.baselines.baseline import Baseline
    from pytest_gpumem.baselines.gate import Change


def add_commands(commands: Any) -> None:
    """Declare them on argparse's subparsers."""
    report = commands.add_parser(
        "report",
        help="make a page or Markdown from a run's JSON report",
        description="Without --html and --md, print Markdown.",
    )
    report.add_argument("report", type=Path, help="the JSON of --gpu-report=json:PATH")
    report.add_argument("--html", type=Path, help="the page to write")
    report.add_argument("--md", type=Path, help="the Markdown to write")
    report.set_defaults(run=_report)

    merge = commands.add_parser(
        "merge",
        help="make one report of several, or one baseline of several",
        description="Of a test in two reports the later one counts; of a peak in two "
        "baselines, the larger.",
    )
    merge.add_argument("files", type=Path, nargs="+", help="reports, or baselines")
    merge.add_argument("--out", type=Path, required=True, help="the file to write")
    merge.set_defaults(run=_merge)

    compare = commands.add_parser(
        "compare",
        help="show how peaks differ between two reports or baselines",
        description="Exit with 1 if a peak grew by more than --fail allows, else 0.",
    )
    compare.add_argument("before", type=Path, help="a report or a baseline")
    compare.add_argument("now", type=Path, help="another")
    compare.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="METRIC:TOLERANCE",
        help="allocated:5%% or reserved:16MiB; may be repeated (default: none fails)",
    )
    compare.set_defaults(run=_compare)


def _report(options: argparse.Namespace) -> int:
    from pytest_gpumem.reports.document import read  # noqa: PLC0415  # only this command needs it
    from pytest_gpumem.reports.markdown import markdown  # noqa: PLC0415  # likewise

    report = read(options.report)
    if options.html is not None:
        from pytest_gpumem.reports.page import page  # noqa: PLC0415  # likewise

        write_atomically(options.html, page(report))
    if options.md is not None:
        write_atomically(options.md, markdown(report))
    if options.html is None and options.md is None:
        sys.stdout.write(markdown(report))
    return 0


def _is_report(path: Path) -> bool:
    """Tell a report from what is read, and refused, as a baseline."""
    from pytest_gpumem.reports.document import FORMAT  # noqa: PLC0415  # see above

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _merge(options: argparse.Namespace) -> int:
    from pytest_gpumem.baselines.baseline import Baseline  # noqa: PLC0415  # see above
    from pytest_gpumem.reports.document import merge, read, to_text  # noqa: PLC0415  # likewise

    kinds = {_is_report(path) for path in options.files}
    if len(kinds) > 1:
        raise ReportError("merge takes reports or baselines, not both at once")
    if kinds == {True}:
        text = to_text(merge(read(path) for path in options.files))
    else:
        merged = Baseline()
        for path in options.files:
            merged.merge(Baseline.read(path))
        text = merged.to_text()
    write_atomically(options.out, text)
    sys.stdout.write(f"{options.out}\n")
    return 0


def _peaks(path: Path) -> Baseline:
    """Return a report's or a baseline's peaks, as a baseline has them."""
    from pytest_gpumem.baselines.baseline import (  # noqa: PLC0415  # see above
        METRICS,
        Baseline,
        metric_key,
    )
    from pytest_gpumem.reports.document import read  # noqa: PLC0415  # likewise

    if not _is_report(path):
        return Baseline.read(path)
    before = {"call": "", "children": "children "}
    peaks: dict[str, dict[str, dict[str, int]]] = {}
    for test in read(path)["tests"]:
        found = {
            before[each["phase"]] + metric_key(metric, each["device_index"]): int(
                each[f"peak_{metric}_bytes"]
            )
            for each in test["figures"]
            if each["phase"] in before
            for metric in METRICS
        }
        if found:
            peaks.setdefault(test["environment"], {})[test["nodeid"]] = found
    return Baseline(peaks)


def _compare(options: argparse.Namespace) -> int:
    from pytest_gpumem.baselines.gate import Tolerance, compare  # noqa: PLC0415  # see above

    try:
        gate = [Tolerance.parse(text) for text in options.fail]
    except ValueError as error:
        raise ReportError(f"--fail: {error}") from None
    before, now = _peaks(options.before).peaks, _peaks(options.now).peaks
    changes: list[Change] = []
    same = new = 0
    shared = before.keys() & now.keys()
    for environment in sorted(shared):
        known = before[environment]
        for test, peaks in sorted(now[environment].items()):
            if test not in known:
                new += 1
                continue
            found = compare(test, known[test], peaks, gate)
            same += not found
            changes += found
    if not shared and before and now:
        raise ReportError(
            f"the files share no environment: {', '.join(sorted(before))} and "
            f"{', '.join(sorted(now))}; compare runs on the same card and PyTorch"
        )
    gone = sum(len(before[each].keys() - now[each].keys()) for each in shared)
    for line in _table(changes):
        sys.stdout.write(f"{line}\n")
    bad = sum(each.is_regression for each in changes)
    counts = {"the same": same, "new": new, "gone": gone, "beyond --fail": bad}
    parts = [f"{len({each.test for each in changes})} tests changed"]
    parts += [f"{count} {word}" for word, count in counts.items() if count]
    sys.stdout.write(f"{', '.join(parts)}\n")
    return 1 if bad else 0


def _table(changes: list[Change]) -> list[str]:
    from pytest_gpumem.sizes import format_size  # noqa: PLC0415  # see above
    from pytest_gpumem.tables import align  # noqa: PLC0415  # likewise

    if not changes:
        return []
    rows = [("before", "now", "Δ", "%", "metric", "test")]
    for each in sorted(changes, key=lambda each: -abs(each.now - each.before)):
        delta = each.now - each.before
        rows.append(
            (
                format_size(each.before),
                format_size(each.now),
                f"{'+' if delta >= 0 else '-'}{format_size(abs(delta))}",
                f"{each.percent:+.1f}",
                each.metric + (" !" if each.is_regression else ""),
                each.test,
            )
        )
    return align(rows, left=(4,))
