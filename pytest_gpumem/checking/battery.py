"""Everything that there is to try on a loader, and what came of it."""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.errors import CheckError, SizeError
from pytest_gpumem.instruments.fallback import (
    CONTROL,
    FAULTS,
    FallbackReport,
    FallbackRun,
    check_fallback,
)
from pytest_gpumem.instruments.loads import CANNOT_RUN, HALF_MOVED, OUTPUT, model_in
from pytest_gpumem.instruments.recorder import PeakRecorder
from pytest_gpumem.instruments.surroundings import RandomState
from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.rules.rule import NOT_OOM
from pytest_gpumem.sizes import format_size, parse_size
from pytest_gpumem.stacks import is_users_own
from pytest_gpumem.sweeps.plan import SweepPlan
from pytest_gpumem.sweeps.report import MODES, Outcome, SweepReport, Verdict, mode_of
from pytest_gpumem.sweeps.run import sweep_ooms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device

_WORDS: Final = 400


class _Run(NamedTuple):
    """One run of the battery, whichever instrument has made it."""

    cause: str
    end: str
    is_good: bool
    has_output: bool
    left_bytes: int
    problems: tuple[str, ...]

    def has(self, *problems: str) -> bool:
        return any(each.startswith(problems) for each in self.problems)


@dataclass(frozen=True, slots=True)
class CheckFinding:
    """The answer to one question about a loader.

    Attributes:
        question: What should hold.
        num_good: Runs in which it did.
        num_tried: Runs that could tell.
        words: What was seen where it did not, or why nothing could tell.
    """

    question: str
    num_good: int
    num_tried: int
    words: str = ""

    @property
    def holds(self) -> bool:
        """Whether it held in every run that could tell."""
        return self.num_good == self.num_tried


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderCheck:
    """What was found of a loader.

    Attributes:
        name: The loader.
        card: The card, in words.
        staircase: Where it ended under each budget and fault.
        sweeps: What came of failed allocations, by each of ``MODES``.
        reference: What outputs were compared with, in words; empty if with nothing.
    """

    name: str
    card: str
    staircase: FallbackReport
    sweeps: tuple[SweepReport, ...]
    reference: str

    @property
    def findings(self) -> tuple[CheckFinding, ...]:
        """The verdicts: on what was done to the loader, then on what came of it."""
        runs = [_of_step(each) for each in self.staircase.steps]
        for report in self.sweeps:
            runs += [_of_outcome(each, report) for each in report.outcomes]
        found = []
        for cause, question in _QUESTIONS.items():
            tried = [each for each in runs if each.cause == cause]
            bad = [each.end for each in tried if not each.is_good]
            found.append(_finding(question, tried, bad))
        left = [format_size(each.left_bytes) for each in runs if each.left_bytes > 0]
        found.append(_finding("leaves nothing on the card", runs, left))
        half = ["half moved" for each in runs if each.has(HALF_MOVED)]
        found.append(_finding("never leaves a model half moved", runs, half))
        if not self.reference:
            none = "not tried: name a function that computes, with --run"
            return (*found, CheckFinding("computes the same", 0, 0, none))
        loaded = [
            each
            for each in runs
            if each.has_output and not each.has(HALF_MOVED, CANNOT_RUN)
        ]
        wrong = ["other output" for each in loaded if each.has(OUTPUT)]
        question = f"computes the same as {self.reference}"
        return (*found, _finding(question, loaded, wrong))

    @property
    def is_good(self) -> bool:
        """Whether everything held."""
        return all(each.holds for each in self.findings)

    @property
    def has_variants(self) -> bool:
        """Whether a rung was another model than that of the whole card."""
        return any("M parameters" in each.rung for each in self.staircase.steps)


#: What each cause of a run asks. The control comes last, as no OOM is in it.
_QUESTIONS: Final = {
    "whole": "loads on the whole card",
    "budget": "loads under each budget",
    "transient": "recovers where one allocation fails",
    "persistent": "recovers, or ends in a clean OOM, where the card stays full",
    "control": "lets an error through that is not an OOM",
}


def _finding(question: str, tried: Sequence[_Run], bad: Sequence[str]) -> CheckFinding:
    words = ", ".join(f"{n} x {end}" for end, n in Counter(bad).most_common())
    return CheckFinding(question, len(tried) - len(bad), len(tried), words)


def _cause(rule: str) -> str:
    parsed = parse_rule(rule)
    return "control" if parsed.flavour == NOT_OOM else mode_of(parsed)


def _of_step(step: FallbackRun) -> _Run:
    cause = "whole" if step.budget_bytes is None else "budget"
    return _Run(
        cause if step.fault is None else _cause(step.fault),
        _end(step),
        not step.problems,
        not step.rung.startswith("raised"),
        step.left_bytes,
        step.problems,
    )


def _end(step: FallbackRun) -> str:
    """Return what a step ended in, shortly: of one that is not right, why."""
    if step.rung.startswith("raised") or not step.problems:
        return step.rung
    first = step.problems[0]
    if first.startswith(HALF_MOVED):
        return "half moved"
    if first.startswith(OUTPUT):
        return "other output"
    return "bytes left" if step.left_bytes > 0 else first.partition(":")[0]


def _of_outcome(outcome: Outcome, report: SweepReport) -> _Run:
    return _Run(
        _cause(outcome.point.rule),
        outcome.verdict.value,
        outcome.passes(recover=report.recover),
        outcome.verdict in {Verdict.RECOVERED, Verdict.WRONG_RESULT},
        outcome.left_bytes,
        (outcome.detail.removeprefix(f"{AssertionError.__name__}: "),),
    )


def check_loader(
    load: Callable[[], Any],
    *,
    run: Callable[[Any], Any] | None = None,
    budgets: Sequence[str | int] | None = None,
    points: str | int = "ends",
    only: str | None = None,
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
    device: Device | None = None,
) -> LoaderCheck:
    """Try everything on a loader: budgets, faults, every place that allocates.

    It is loaded on the whole card, under budgets, and with allocations failing, each
    alone and with all later ones. Each time it is judged where the model ended, what is
    left on the card, and what the model computes.

    Args:
        load: The loader; returns a model, or an object with one.
        run: Computes an output from what ``load`` returns, with the model on the card
            or on the CPU.
        budgets: Sizes to load under; None means those of ``check_fallback``: shares of
            what load and run reserve on the whole card.
        points: Which allocations fail: as ``sweep_ooms`` takes it.
        only: An injection rule or a size: the run under that alone.
        name: The loader's name, for texts.
        progress: Told of each run, in words.
        device: Where; None means the active device.

    Returns:
        The report. Outputs are compared with what the whole card's model computes on
        the CPU in fp32; where it cannot be moved there, with what it computes itself.

    Raises:
        CheckError: The loader fails by itself, loads no model, or uses no card.
        SizeError: A budget is not a size.
        SweepError: ``points`` makes no sense.
        RuleError: ``only`` is neither a rule nor a size.

    Example::

        assert check_loader(load, run=infer, budgets=["4GiB", "1GiB"]).is_good
    """
    SweepPlan(points=points)  # a mistake in it is told before any run
    device = active_device() if device is None else device
    name = name or str(getattr(load, "__qualname__", repr(load)))
    say = progress or (lambda _text: None)
    faults: Sequence[str] = FAULTS
    control: str | None = CONTROL
    if only is not None:
        control = None
        budgets, faults = ([only], []) if _is_size(only) else ([], [only])
        for each in faults:
            parse_rule(each)
    say("on the whole card, and on the CPU")
    start = RandomState()
    first = _First(name, load, run, device)
    gc.collect()
    device.empty_cache()
    start.restore()  # each load begins as the first
    staircase = check_fallback(
        load,
        run=run,
        reference=first.reference,
        budgets=budgets,
        faults=faults,
        control=control,
        variants=True,
        progress=lambda step: say(f"{step.cause}: {step.rung}"),
        device=device,
    )

    def told(done: int, total: int, outcome: Outcome) -> None:
        say(f"{done} of {total}: {outcome.point}: {outcome.verdict.value}")

    sweeps = [
        sweep_ooms(
            load,
            # What computes nothing still asks for a whole model.
            run=run or (lambda _loaded: None),
            variants=True,
            points=points,
            modes=[mode],
            recover=mode == "transient",
            name=name,
            progress=told,
            device=device,
        )
        for mode in (MODES if only is None else ())
    ]
    card = f"{device.name(0)} {format_size(device.total_bytes(0))}, {device.kind}"
    return LoaderCheck(
        name=name,
        card=card,
        staircase=staircase,
        sweeps=tuple(sweeps),
        reference=first.words,
    )


def _is_size(text: str) -> bool:
    try:
        parse_size(text)
    except SizeError:
        return False
    return True


class _First:
    """The first load, and what its model computes.

    Attributes:
        reference: What the model computes on the CPU; None where that is not known.
        words: What outputs are compared with; empty if with nothing.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], Any],
        run: Callable[[Any], Any] | None,
        device: Device,
    ) -> None:
        self.reference: Any = None
        self.words = ""
        with PeakRecorder(device=device) as recorder:
            loaded = _tried(f"{name} fails without any fault", load)
            model = model_in(loaded)
            if model is None:
                kind = type(loaded).__name__
                raise CheckError(
                    f"{name} returned {kind}, in which there is no torch.nn.Module; let "
                    "it return the model, or an object with the attribute model",
                    value=name,
                )
            if run is not None:
                _tried("what --run names fails on the loaded model", run, loaded)
        if not recorder.figures.peak_reserved_bytes:
            raise CheckError(
                f"{name} puts nothing on the card; what is checked is a loader that "
                'does, with .to("cuda") or device_map="auto"',
                value=name,
            )
        if run is not None:
            self._compute_on_cpu(loaded, model, run)

    def _compute_on_cpu(
        self, loaded: Any, model: Any, run: Callable[[Any], Any]
    ) -> None:
        self.words = "on the whole card"
        try:
            model.to("cpu").float()
            self.reference = run(loaded)
        except Exception:  # noqa: BLE001  # a model that is quantised, or dispatched by hooks
            return
        if self.reference is not None:
            self.words = "the CPU"


def _tried(trouble: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function.

    Raises:
        CheckError: It raised; the place is said.
    """
    try:
        return call(*arguments)
    except (Exception, SystemExit) as error:
        lines = traceback.extract_tb(error.__traceback__)[1:]
        own = [each for each in lines if is_users_own(each.filename)] or lines
        where = ""
        if own:
            last = own[-1]
            where = f" at {Path(last.filename).name}:{last.lineno} in {last.name}"
        text = f"{type(error).__name__}: {str(error).strip()[:_WORDS]}"
        raise CheckError(f"{trouble}{where}: {text}", value=trouble) from error
