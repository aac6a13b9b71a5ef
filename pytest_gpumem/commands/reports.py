"""The commands on reports and baselines: ``report``, ``merge``, ``compare``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.errors import ReportError
from pytest_gpumem.files import write_atomically

if TYPE_CHECKING:
    import argparse

    from pytest_gpumem.baselines.baseline import Baseline
    from pytest_gpumem.reports.document import Report


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
        help="merge several reports into one, or several baselines into one",
        description="If two reports have the same test, the later report counts; if two "
        "baselines have the same figure, the larger one counts.",
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
    compare.add_argument("now", type=Path, help="another report or baseline")
    compare.add_argument(
        "--fail",
        action="append",
        default=[],
        metavar="METRIC:TOLERANCE",
        help="allocated:5%% or reserved:16MiB; may be repeated (default: none fails)",
    )
    compare.add_argument(
        "--html", type=Path, help="a page with both reports side by side, to write"
    )
    compare.set_defaults(run=_compare)


def _report(options: argparse.Namespace) -> int:
    from pytest_gpumem.reports.document import read_report
    from pytest_gpumem.reports.markdown import markdown

    report = read_report(options.report)
    if options.html is not None:
        from pytest_gpumem.reports.page import page

        write_atomically(options.html, page(report))
    if options.md is not None:
        write_atomically(options.md, markdown(report))
    if options.html is None and options.md is None:
        sys.stdout.write(markdown(report))
    return 0


def _read(path: Path) -> Report | Baseline:
    """Read a report or a baseline.

    Raises:
        ReportError: It is a damaged report.
        BaselineError: It is neither of the two, or cannot be read.
    """
    from pytest_gpumem.baselines.baseline import Baseline
    from pytest_gpumem.reports.document import FORMAT, parse

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    return parse(text, str(path)) if f'"{FORMAT}"' in text else Baseline.read(path)


def _merge(options: argparse.Namespace) -> int:
    from pytest_gpumem.baselines.baseline import Baseline
    from pytest_gpumem.reports.document import Report, to_chunks
    from pytest_gpumem.reports.merging import merge

    files = [_read(path) for path in options.files]
    reports = [each for each in files if isinstance(each, Report)]
    if reports and len(reports) < len(files):
        raise ReportError("merge takes reports or baselines, not both at once")
    if reports:
        write_atomically(options.out, to_chunks(merge(reports)))
    else:
        merged = Baseline()
        for each in files:
            if isinstance(each, Baseline):
                merged.merge(each)
        write_atomically(options.out, merged.to_text())
    sys.stdout.write(f"{options.out}\n")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from pytest_gpumem.baselines.regressions import Tolerance
    from pytest_gpumem.commands.comparison import compare_files

    try:
        gate = [Tolerance.parse(text) for text in options.fail]
    except ValueError as error:
        raise ReportError(f"--fail: {error}") from None
    before, now = _read(options.before), _read(options.now)
    lines, outcome = compare_files(before, now, gate, options.before.name)
    if options.html is not None:
        from pytest_gpumem.reports.document import Report
        from pytest_gpumem.reports.page import page

        if not isinstance(before, Report) or not isinstance(now, Report):
            raise ReportError(
                "--html shows two reports side by side, and a baseline has no timelines; "
                "write reports with --gpu-report=json:PATH"
            )
        write_atomically(options.html, page(replace(now, baseline=outcome), before))
    for line in lines:
        sys.stdout.write(f"{line}\n")
    return int(any(each.is_regression for each in outcome.changes))
