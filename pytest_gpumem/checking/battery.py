"""Runs all checks on a loader, and collects the results."""

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
    check_fallback,
)
from pytest_gpumem.instruments.loads import CANNOT_RUN, HALF_MOVED, OUTPUT, model_in
from pytest_gpumem.instruments.recorder import PeakRecorder
from pytest_gpumem.instruments.surroundings import RandomState
from pytest_gpumem.records.record import Verdict
from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.rules.rule import NOT_OOM
from pytest_gpumem.sizes import format_size, parse_size
from pytest_gpumem.stacks import is_users_own
from pytest_gpumem.sweeps.plan import SweepPlan
from pytest_gpumem.sweeps.report import MODES, Outcome, SweepReport, mode_of
from pytest_gpumem.sweeps.run import sweep_ooms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.records.record import FallbackStep

_WORDS: Final = 400


class _Run(NamedTuple):
    """One run of the loader, by ``check_fallback`` or by a sweep."""

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
        question: The requirement, in words.
        num_good: The number of runs that met it.
        num_tried: The number of runs in which it could be checked.
        words: What was seen in the other runs, or why no run could check it.
    """

    question: str
    num_good: int
    num_tried: int
    words: str = ""

    @property
    def holds(self) -> bool:
        """Whether every run that could be checked met the requirement."""
        return self.num_good == self.num_tried


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderCheck:
    """The results of all checks of a loader.

    Attributes:
        name: The loader's name.
        card: The card, in words.
        staircase: Where the model ended under each budget and fault.
        sweeps: The results of failed allocations, by each of ``MODES``.
        reference: What outputs were compared with, in words; empty if they were not
            compared.
    """

    name: str
    card: str
    staircase: FallbackReport
    sweeps: tuple[SweepReport, ...]
    reference: str

    @property
    def findings(self) -> tuple[CheckFinding, ...]:
        """The verdicts: one for each kind of run, then one for each kind of problem."""
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
        """Whether every requirement was met."""
        return all(each.holds for each in self.findings)

    @property
    def has_variants(self) -> bool:
        """Whether a rung was a different model from that of the whole card."""
        return any("M parameters" in each.rung for each in self.staircase.steps)


#: The question that each cause of a run answers. The control has no OOM and comes last.
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


def _of_step(step: FallbackStep) -> _Run:
    cause = "whole" if step.budget_bytes is None else "budget"
    return _Run(
        cause if step.fault is None else _cause(step.fault),
        _end(step),
        not step.problems,
        not step.rung.startswith("raised"),
        step.left_bytes,
        step.problems,
    )


def _end(step: FallbackStep) -> str:
    """Return a short text: where a step ended, or its problem if it has one."""
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
    """Check a loader under budgets and faults, and at every place that allocates.

    The loader runs on the whole card, then under budgets, then with failing allocations:
    each of them fails alone, and together with all later ones. After each run three things
    are judged: where the model ended, what is left on the card, and what the model
    computes.

    Args:
        load: The loader; returns a model, or an object with one.
        run: Computes an output from what ``load`` returns, with the model on the card
            or on the CPU.
        budgets: Budgets to load under; None means those of ``check_fallback``: shares of
            the bytes that load and run reserve on the whole card.
        points: Which allocations fail, as for ``sweep_ooms``.
        only: An injection rule or a size; only this run is made.
        name: The loader's name, for texts.
        progress: Called with a sentence for each run.
        device: The device; None means the active device.

    Returns:
        The report. The model of the whole card is moved to the CPU and computes there in
        fp32; outputs are compared with this result. If the model cannot be moved, outputs
        are compared with what it computes on the card.

    Raises:
        CheckError: The loader fails by itself, loads no model, or uses no card.
        SizeError: A budget is not a size.
        SweepError: ``points`` makes no sense.
        RuleError: ``only`` is neither a rule nor a size.

    Example::

        assert check_loader(load, run=infer, budgets=["4GiB", "1GiB"]).is_good
    """
    SweepPlan(points=points)  # raises for a mistake, before any run
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
    start.restore()  # so that each load begins in the same state as the first
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
            # Without ``run`` nothing is computed, but the model must still be whole.
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
        reference: What the model computes on the CPU; None if that is not known.
        words: What outputs are compared with; empty if they are not compared.
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
        except Exception:  # noqa: BLE001  # a quantised or dispatched model cannot be moved
            return
        if self.reference is not None:
            self.words = "the CPU"


def _tried(trouble: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function.

    Raises:
        CheckError: The function raised; the text names the place.
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
