"""The results of a loader's checks, as text for people and as a test file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.checking.named_function import NamedFunction
from pytest_gpumem.errors import CheckError
from pytest_gpumem.sizes import format_size
from pytest_gpumem.sweeps.sweep_record import summary_of
from pytest_gpumem.sweeps.text import coverage_table, explain_failures, summarise
from pytest_gpumem.tables import align

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.checking.battery import LoaderCheck

#: The most characters of a problem that are shown; a replay shows the whole text.
_WORDS: Final = 160


@dataclass(frozen=True, slots=True)
class CheckRequest:
    """The request on the command line.

    Attributes:
        load: The loader.
        run: The function that computes with the model; None if there is none.
        card: The simulated card's name; None means the machine's card.
    """

    load: NamedFunction
    run: NamedFunction | None = None
    card: str | None = None

    @classmethod
    def parse(cls, text: str) -> CheckRequest:
        """Read ``MODULE:LOAD`` or ``MODULE:LOAD,run=MODULE:INFER``.

        Raises:
            CheckError: The text has another form.
        """
        load, _comma, rest = text.partition(",")
        name, _equals, run = rest.partition("=")
        if rest and name != "run":
            raise CheckError(
                f"{text!r}: {rest!r} is not accepted; write MODULE:LOAD, or "
                "MODULE:LOAD,run=MODULE:INFER",
                value=text,
            )
        return cls(
            NamedFunction.parse(load), NamedFunction.parse(run) if rest else None
        )

    def resolve(self) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """Return both functions.

        Raises:
            CheckError: There is no function of that name, or it cannot be called.
        """
        run = None if self.run is None else self.run.resolve("what the loader returns")
        return self.load.resolve(), run

    def __str__(self) -> str:
        return f"{self.load}" if self.run is None else f"{self.load},run={self.run}"

    def command(self, *more: str) -> str:
        """Return the command line, with more arguments at its end."""
        words = ["pytest-gpumem", "check", str(self.load)]
        words += [] if self.run is None else ["--run", str(self.run)]
        words += [] if self.card is None else ["--card", self.card]
        return shlex.join([*words, *more])


def check_lines(check: LoaderCheck, request: CheckRequest) -> Iterator[str]:
    """Yield the lines of a report: what was tried, what is wrong, the verdicts.

    Args:
        check: The results.
        request: The command line's request, for the command that repeats a run.
    """
    yield f"{check.name} on {check.card}"
    yield ""
    yield str(check.staircase)
    names = {"transient": "fails alone", "persistent": "and all later ones fail"}
    for report in check.sweeps:
        if report.outcomes:
            mode = report.outcomes[0].point.mode
            yield ""
            yield f"an allocation {names[mode]}: {summarise(summary_of(report))}"
            yield coverage_table(summary_of(report))
    wrong = list(_wrong(check, request))
    if wrong:
        yield ""
        yield "what is wrong"
        yield from (f"  {line}".rstrip() for text in wrong for line in text.split("\n"))
    yield ""
    yield from verdict_table(check)


def verdict_table(check: LoaderCheck) -> Iterator[str]:
    """Yield each verdict on a line."""
    rows = [("verdict", "runs", "")]
    for each in check.findings:
        if not each.num_tried and not each.words:
            continue
        verdict = "ok" if each.holds else "FAILED"
        words = f": {each.words}" if each.words else ""
        rows.append(
            (
                verdict if each.num_tried else "-",
                f"{each.num_good} of {each.num_tried}" if each.num_tried else "-",
                f"{each.question}{words}",
            )
        )
    yield from align(rows, left=(0,))


def _wrong(check: LoaderCheck, request: CheckRequest) -> Iterator[str]:
    for step in check.staircase.steps:
        if not step.problems:
            continue
        yield f"{step.cause}: it ended in {step.rung}"
        shown = (shorten(each, _WORDS, placeholder=" …") for each in step.problems)
        yield from (f"  {problem}" for problem in shown)
        yield from (f"    {holder}" for holder in step.holders)
        if step.fault is not None:
            yield f"  replay: {request.command('--replay', step.fault)}"
        elif step.budget_bytes is not None:
            size = format_size(step.budget_bytes, exact=True).replace(" ", "")
            yield f"  replay: {request.command('--replay', size)}"
    for report in check.sweeps:
        if report.failures:
            yield explain_failures(
                report, lambda rule: request.command("--replay", rule)
            )


def as_test_file(
    load: NamedFunction,
    run: NamedFunction | None = None,
    check: LoaderCheck | None = None,
) -> str:
    """Return the text of a test file that checks a loader as ``check_loader`` does.

    Args:
        load: The loader.
        run: The function that computes with the model; None if there is none.
        check: The results. The test expects the same rung for each budget that ended
            well; with None it expects no particular rung.
    """
    imports = sorted({target.module for target in (load, run) if target is not None})
    options = [] if run is None else [f"run={run.expression}"]
    if check is None or check.has_variants:
        options.append("variants=True")
    steps = [] if check is None else check.staircase.steps[1:]
    sizes = {
        format_size(each.budget_bytes, exact=True): each
        for each in steps
        if each.budget_bytes is not None
    }
    rungs = {size: each.rung for size, each in sizes.items() if not each.problems}
    told = []
    if sizes:
        told = ["budgets=BUDGETS", "expect=RUNGS"]
    lines = [
        f'"""Checks {load} where the card runs out of memory."""',
        "",
        "import pytest",
        "",
        *(f"import {name}" for name in imports),
    ]
    if sizes:
        lines += [
            "",
            "#: Budgets for a load, and the rung on which each load ended.",
            "BUDGETS = [",
            *(f'    "{size}",' for size in sizes),
            "]",
            "RUNGS = {",
            *(f'    "{size}": "{rung}",' for size, rung in rungs.items()),
            "}",
        ]
    lines += [
        "",
        "",
        "def test_it_ends_where_it_should(fallback):",
        '    """Under each budget and fault; an error that is not an OOM comes through."""',
        *_call("fallback", [load.expression, *options, *told]),
        "",
        "",
        '@pytest.mark.parametrize("mode", ["transient", "persistent"])',
        "def test_it_survives_failed_allocations(oom_sweep, mode):",
        '    """Each place that allocates: once alone, once with all later ones."""',
        *_call(
            "oom_sweep",
            [
                load.expression,
                *(
                    options
                    if run is not None
                    else ["run=lambda loaded: None", *options]
                ),
                'points="ends"',
                "modes=[mode]",
                'recover=mode == "transient"',
            ],
        ),
        "",
    ]
    return "\n".join(lines)


def _call(function: str, arguments: list[str]) -> list[str]:
    return [f"    {function}(", *(f"        {each}," for each in arguments), "    )"]
