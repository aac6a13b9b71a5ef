"""Checks to which step a loader falls back under budgets and faults, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.instruments.loads import ERROR_CHARACTERS, Loader, is_no_oom
from pytest_gpumem.records.record import FallbackStep
from pytest_gpumem.records.staircase import staircase_table
from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.instruments.loads import LoadVerdict
    from pytest_gpumem.instruments.module_parts import Placement
    from pytest_gpumem.rules.rule import Rule

#: Default budgets of a staircase, as shares of the bytes that the top rung reserves.
SHARES: Final = (1.0, 0.6, 0.35, 0.15, 0.05)
#: Faults that are tried in addition to the budgets: the first allocation of a load fails,
#: and every allocation fails, so that the fallback itself meets an OOM.
FAULTS: Final = ("any:nth=1", "any:nth=1,persistent")
#: The rule that raises an error that no fallback may swallow.
CONTROL: Final = "any:nth=1,flavour=not-oom"
_MIB: Final = 2**20
_SMALLEST: Final = 2 * _MIB


@dataclass(frozen=True, slots=True)
class FallbackReport:
    """Every step of a check, beginning with the whole card.

    Attributes:
        steps: Budgets first, from the largest, then faults.
    """

    steps: tuple[FallbackStep, ...]

    @property
    def staircase(self) -> tuple[tuple[int | None, str], ...]:
        """Each budget in bytes (None means the whole card), and the rung it leads to."""
        return tuple((s.budget_bytes, s.rung) for s in self.steps if s.fault is None)

    def __str__(self) -> str:
        return staircase_table(self.steps)

    def check(self) -> None:
        """Raise if any step has a problem.

        Raises:
            AssertionError: The text has each problem with its step, what holds the bytes
                that are left, and the table.
        """
        __tracebackhide__ = True  # so that pytest shows the caller's line
        lines = []
        for step in self.steps:
            lines += [f"{step.cause}: {problem}" for problem in step.problems]
            lines += [f"    {holder}" for holder in step.holders if step.problems]
        if lines:
            problems = "\n".join(f"  {line}" for line in lines)
            raise AssertionError(f"the fallback does not hold:\n{problems}\n{self}")


def check_fallback(
    load: Callable[[], Any],
    *,
    run: Callable[[Any], Any] | None = None,
    reference: Any = None,
    budgets: Sequence[str | int] | None = None,
    faults: Sequence[str] = FAULTS,
    control: str | None = CONTROL,
    expect: Mapping[str | int, str] | None = None,
    model_of: Callable[[Any], Any] | None = None,
    variants: bool = False,
    progress: Callable[[FallbackStep], None] | None = None,
    device_index: int = 0,
    device: Device | None = None,
) -> FallbackReport:
    """Run a loader under budgets and faults, and report where each run ended.

    Args:
        load: The loader under test; returns a model, or an object with one.
        run: Computes an output from what ``load`` returns.
        reference: The right output; None means that of the whole card's run.
        budgets: Budgets to load under; None means shares of the bytes that the whole
            card's run reserves, in whole MiB.
        faults: Injection rules to load under, on the whole card. The loader must recover,
            with two exceptions: a persistent fault may reach the caller, and an error
            that is not an OOM (``flavour=not-oom``) must reach it.
        control: A further rule, with an error that is not an OOM; None leaves it out.
        expect: For a budget, a text that its rung must contain.
        model_of: Finds the model in what ``load`` returns; None means the returned object
            itself, or its attribute ``model``.
        variants: Whether a rung may be a different model, recognised by its number of
            parameters; the output of such a model is not compared.
        progress: Called with each step once it is judged.
        device_index: The card.
        device: The device; None means the active device.

    Returns:
        The report; ``report.check()`` raises if any step has a problem.

    Raises:
        SizeError: A budget is not a size.
        RuleError: A fault is not a rule.

    Example::

        check_fallback(lambda: load_model(path), run=classify, budgets=["1GiB"]).check()
    """
    loader = Loader(
        load,
        run=run,
        reference=reference,
        model_of=model_of,
        variants=variants,
        device=device,
        device_index=device_index,
    )
    told = progress or (lambda _step: None)
    wanted = {parse_size(size): rung for size, rung in (expect or {}).items()}
    every = [*faults, *([control] if control and control not in faults else [])]
    rules = [parse_rule(fault) for fault in every]
    top = _step(loader, told)
    if budgets is None:
        shares = [int(share * top.peak_reserved_bytes) for share in SHARES]
        budgets = [max(-(-each // _MIB) * _MIB, _SMALLEST) for each in shares]
    sizes = sorted({*map(parse_size, budgets), *wanted}, reverse=True)
    below = [_step(loader, told, size, expected=wanted.get(size)) for size in sizes]
    faulty = [
        _step(loader, told, fault=fault, rule=rule)
        for fault, rule in zip(every, rules, strict=True)
    ]
    return FallbackReport((top, *below, *faulty))


def _step(
    loader: Loader,
    told: Callable[[FallbackStep], None],
    budget_bytes: int | None = None,
    *,
    fault: str | None = None,
    rule: Rule | None = None,
    expected: str | None = None,
) -> FallbackStep:
    """Load once and judge."""
    done = loader.load(
        *([] if rule is None else [rule]),
        budget_bytes=budget_bytes,
        catches=lambda error: isinstance(error, (Exception, SystemExit)),
    )
    problems = [*_of_error(done, rule), *done.problems]
    rung = "nothing" if done.placement is None else _rung(done.placement)
    if done.placement is not None and loader.is_variant(done.placement):
        rung += f", {done.placement.num_parameters / 1e6:,.1f} M parameters"
    if done.failure is not None:
        rung = f"raised {done.failure.kind.__name__}"
    if expected is not None and expected not in rung:
        problems.append(f"it ended in {rung!r}, expected was {expected!r}")
    size = "whole card" if budget_bytes is None else format_size(budget_bytes)
    step = FallbackStep(
        fault or size,
        budget_bytes,
        fault,
        rung,
        done.num_ooms,
        done.figures.peak_reserved_bytes,
        done.left_bytes,
        done.holders,
        tuple(problems),
    )
    told(step)
    return step


def _of_error(done: LoadVerdict, rule: Rule | None) -> list[str]:
    """Return the problems with a load's error; empty if the load did not raise."""
    failure = done.failure
    if failure is None:
        return []
    words = failure.words(ERROR_CHARACTERS)
    is_control = rule is not None and is_no_oom(rule)
    if not failure.is_oom:
        if is_control and done.num_injected:
            return [
                f"an error that is not an OOM was lost, and another raised: {words}"
            ]
        return [f"it ended in an error that is not an OOM: {words}"]
    # A persistent fault may reach the caller; an error that is not an OOM must reach it.
    may_end = is_control or (rule is not None and rule.times is None)
    return [] if may_end else [f"it did not recover: {words}"]


def _rung(placement: Placement) -> str:
    """Return a short text of where a model ended: devices and dtypes."""
    devices = "+".join(sorted(placement.devices)).replace("meta", "offloaded")
    dtypes = ",".join(sorted(str(each)[len("torch.") :] for each in placement.dtypes))
    return f"{devices} {dtypes}".strip()
