"""Lists failures with the commands that repeat them, as Markdown for an issue."""

from __future__ import annotations

import re
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_gpumem.reports.descriptions import environment_line, limit_words
from pytest_gpumem.sizes import format_size
from pytest_gpumem.sweeps.sweep_record import whole_sweeps
from pytest_gpumem.sweeps.text import summarise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.records.record import Record
    from pytest_gpumem.records.run_record import Change
    from pytest_gpumem.reports.document import Report

#: The most tests that are described, because an issue's text has room for 64 KiB.
TOP: Final = 20


def reproduction(report: Report, options: Sequence[str] = ()) -> str:
    """Return each failure with its command, its rule and its environment.

    Absolute paths of this machine become ``.``, ``~`` and ``$TMPDIR``; hosts are left
    out.

    Args:
        report: The run.
        options: The run's options of this plugin, as on the command line.
    """
    changes: dict[str, list[Change]] = {}
    if report.baseline is not None:
        for each in report.baseline.changes:
            if each.is_regression:
                changes.setdefault(each.test, []).append(each)
    bad = [
        each
        for each in report.tests
        if each.outcome in {"failed", "error"} or each.nodeid in changes
    ]
    lines = ["## GPU memory: what fails, and how to run it again", ""]
    lines += [f"- {each}" for each in report.runs]
    for machine in report.environments:
        _host, _dot, words = environment_line(machine).partition(" · ")
        lines.append(f"- {words} · pytest-gpumem {report.plugin}")
    lines += [] if bad else ["", "No test that used a card failed."]
    for test in bad[:TOP]:
        lines += ["", *_failure(test, changes.get(test.nodeid, ()), options)]
    if len(bad) > TOP:
        lines += ["", f"… and {len(bad) - TOP} more."]
    hosts = {each.host for each in report.environments if each.host}
    return anonymous("\n".join([*lines, ""]), hosts)


def _failure(
    test: Record, changes: Sequence[Change], options: Sequence[str]
) -> Iterator[str]:
    yield f"### `{test.nodeid}`: {test.outcome}"
    yield ""
    sweeps = [each for each in whole_sweeps(test.sweeps) if each.failures]
    replays = [replay for sweep in sweeps for replay in sweep.replays]
    checked = f"--gpu-check={test.nodeid.partition('::')[0]}"
    # Tests of --gpu-check are in no file, so they cannot be named.
    own = [] if checked in options else [test.nodeid]
    commands = [each.command for each in replays]
    yield "```console"
    for command in commands or [shlex.join(["pytest", *own])]:
        given = [each for each in options if each not in shlex.split(command)]
        yield f"$ {command} {shlex.join(given)}".rstrip()
    yield "```"
    yield ""
    for sweep in sweeps:
        yield f"- sweep: {summarise(sweep)}"
    for replay in replays:
        yield f"- {replay.points} x {replay.verdict} at `{replay.site or 'unknown'}`"
    yield from _findings(test)
    for change in changes:
        yield (
            f"- baseline: {change.metric} was {format_size(change.before)}, is "
            f"{format_size(change.now)} ({change.excess_text})"
        )
    if test.snapshot:
        yield f"- snapshot for memory_viz, to attach: `{Path(test.snapshot).name}`"


def _findings(test: Record) -> Iterator[str]:
    """Yield what was wrong with fallbacks, memory and limits."""
    for step in (each for steps in test.fallbacks for each in steps):
        yield from (f"- under {step.cause}: {each}" for each in step.problems)
    if test.incident:
        yield f"- {test.incident}" + (f" at `{test.site}`" if test.site else "")
    for limit in test.limits:
        if not limit.held:
            yield (
                f"- limit on {limit_words(limit)}: {format_size(limit.limit_bytes)}, "
                f"measured {format_size(limit.measured_bytes)}"
            )


def anonymous(text: str, hosts: set[str]) -> str:
    """Return a text without this machine's folders, and without the names of hosts."""
    folders = [
        (str(Path.cwd()), "."),
        (tempfile.gettempdir(), "$TMPDIR"),
        (str(Path.home()), "~"),
    ]
    # The longest first, because one of these folders may be inside another.
    for folder, word in sorted(folders, key=lambda pair: -len(pair[0])):
        if len(folder) > 1:
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", word, text)
    for host in hosts:
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w.-])", "HOST", text)
    return text
