"""Where a loader's fallback ends under each budget and fault, and what it leaves."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices import allocated_bytes
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.instruments.attempts import is_the_oom
from pytest_gpumem.instruments.budget import vram_budget
from pytest_gpumem.instruments.equality import difference
from pytest_gpumem.instruments.frames import clear_exception
from pytest_gpumem.instruments.holders import (
    blocks_on_cards,
    find_cycles,
    find_holders,
)
from pytest_gpumem.instruments.injector import OomInjector
from pytest_gpumem.instruments.placement import Placement, placement_of
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.recorder import PeakRecorder
from pytest_gpumem.instruments.surroundings import (
    RandomState,
    num_ooms,
    settle,
)
from pytest_gpumem.model.rule_parser import parse_rule
from pytest_gpumem.model.rules import NOT_OOM
from pytest_gpumem.model.staircase import staircase_table
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_gpumem.devices import Device

#: Budgets of a staircase that names none, as shares of what the top rung reserves.
SHARES: Final = (1.0, 0.6, 0.35, 0.15, 0.05)
#: Faults that are tried beside the budgets: the first allocation of a load, and every
#: one, so that the fallback itself meets an OOM.
FAULTS: Final = ("any:nth=1", "any:nth=1,persistent")
#: The error that no fallback may swallow.
CONTROL: Final = "any:nth=1,flavour=not-oom"
_SMALLEST: Final = 2 * 2**20


@dataclass(frozen=True, slots=True)
class Step:
    """What one run of the loader ended in.

    Attributes:
        budget_bytes: The card's share; None for the whole card.
        fault: The injection rule; None for none.
        rung: Where the model ended, for example ``"cuda:0 float16"``; what was raised,
            if the loader raised.
        num_ooms: Allocations that failed on the way: how often it had to retry.
        peak_reserved_bytes: Peak of the whole affair, load and run.
        left_bytes: Bytes on the card that are not the model's own.
        holders: Who holds those, and which reference cycles held more until a collection.
        problems: What is wrong, a sentence each.
    """

    budget_bytes: int | None
    fault: str | None
    rung: str
    num_ooms: int
    peak_reserved_bytes: int
    left_bytes: int
    holders: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def cause(self) -> str:
        """The budget or the fault, in words."""
        if self.fault is not None:
            return self.fault
        return (
            "whole card"
            if self.budget_bytes is None
            else format_size(self.budget_bytes)
        )


@dataclass(frozen=True, slots=True)
class FallbackReport:
    """Every step of a check, from the whole card down.

    Attributes:
        steps: Budgets first, from the largest, then faults.
    """

    steps: tuple[Step, ...]

    @property
    def staircase(self) -> tuple[tuple[int | None, str], ...]:
        """Budget in bytes (None: the whole card) and the rung it leads to."""
        return tuple((s.budget_bytes, s.rung) for s in self.steps if s.fault is None)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the steps as what JSON can hold."""
        return [{"cause": step.cause, **asdict(step)} for step in self.steps]

    def __str__(self) -> str:
        return staircase_table(self.to_json())

    def check(self) -> None:
        """Raise unless every step is as it should be.

        Raises:
            AssertionError: Each problem with its step, who holds what is left, and the
                table.
        """
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
    device_index: int = 0,
    device: Device | None = None,
) -> FallbackReport:
    """Run a loader under budgets and faults and say where each run ended.

    Args:
        load: The loader under test; returns a model, or an object with one.
        run: Computes an output from what ``load`` returns.
        reference: What the output should be; None means that of the whole card.
        budgets: Sizes to load under; None means shares of what the whole card's run
            reserves.
        faults: Injection rules to load under, on the whole card. The loader must
            recover, but from a persistent fault, which may reach the caller, and an
            error that is no OOM (``flavour=not-oom``), which must.
        control: One more rule whose error is no OOM; None leaves it out.
        expect: A budget and a part of the rung's text that it must lead to.
        model_of: Finds the model in what ``load`` returns; None means itself, or its
            attribute ``model``.
        device_index: The card.
        device: Where; None means the active device.

    Returns:
        The report; ``report.check()`` raises unless all is well.

    Raises:
        SizeError: A budget is no size.
        RuleError: A fault is no rule.

    Example::

        check_fallback(lambda: load_model(path), run=classify, budgets=["1GiB"]).check()
    """
    checker = _Checker(
        load=load,
        run=run,
        reference=None if reference is None else portrait(reference),
        model_of=model_of or _model,
        device=active_device() if device is None else device,
        index=device_index,
        random=RandomState(),
    )
    wanted = {parse_size(size): rung for size, rung in (expect or {}).items()}
    causes = [*faults, *([control] if control and control not in faults else [])]
    rules = [parse_rule(cause) for cause in causes]
    top = checker.step(None, None)
    if budgets is None:
        sizes = [
            max(int(share * top.peak_reserved_bytes), _SMALLEST) for share in SHARES
        ]
    else:
        sizes = [parse_size(size) for size in budgets]
    sizes = sorted({*sizes, *wanted}, reverse=True)
    steps = [top]
    steps += [checker.step(size, None, expected=wanted.get(size)) for size in sizes]
    steps += [
        checker.step(None, cause, is_control=rule.flavour == NOT_OOM)
        for cause, rule in zip(causes, rules, strict=True)
    ]
    return FallbackReport(tuple(steps))


@dataclass(slots=True, kw_only=True)
class _Checker:
    """Runs the loader once for each step; see ``check_fallback`` for its parts."""

    load: Callable[[], Any]
    run: Callable[[Any], Any] | None
    reference: Any
    model_of: Callable[[Any], Any]
    device: Device
    index: int
    random: RandomState

    def step(
        self,
        budget_bytes: int | None,
        fault: str | None,
        *,
        expected: str | None = None,
        is_control: bool = False,
    ) -> Step:
        """Run once and judge."""
        device = self.device
        self.random.restore()
        settle(device, 0)
        before, start = blocks_on_cards(), allocated_bytes(device)
        start_ooms = num_ooms(device)
        problems: list[str] = []
        with ExitStack() as stack:
            if budget_bytes is not None:
                stack.enter_context(
                    vram_budget(budget_bytes, device_index=self.index, device=device)
                )
            recorder = stack.enter_context(
                PeakRecorder(device_index=self.index, device=device)
            )
            rules = () if fault is None else (fault,)
            injector = OomInjector(*rules, device=device)
            rung, left, holders = self._attempt(
                injector, fault, problems, before, start, is_control=is_control
            )
        if expected is not None and expected not in rung:
            problems.append(f"it ended in {rung!r}, expected was {expected!r}")
        peak = recorder.figures.peak_reserved_bytes
        if budget_bytes is not None and peak > budget_bytes:
            problems.append(
                f"its peak of {format_size(peak)} reserved is over the budget"
            )
        # Errors of other parts of CUDA are OOMs that the allocator knows nothing of.
        uncounted = injector.num_injected - injector.num_ooms
        return Step(
            budget_bytes,
            fault,
            rung,
            num_ooms(device) - start_ooms + (0 if is_control else uncounted),
            peak,
            left,
            holders,
            tuple(problems),
        )

    def _attempt(
        self,
        injector: OomInjector,
        fault: str | None,
        problems: list[str],
        before: set[int],
        start: int,
        *,
        is_control: bool,
    ) -> tuple[str, int, tuple[str, ...]]:
        """Load and run; return the rung, what is left besides the model, and by whom."""
        loaded: Any = None
        rung = ""
        try:
            with injector:
                loaded = self.load()
        except Exception as error:  # noqa: BLE001  # the verdict is on whatever it is
            rung = f"raised {type(error).__name__}"
            self._judge_error(error, problems, fault, is_control=is_control)
            clear_exception(error)
        else:
            if is_control and injector.num_injected:
                problems.append("an error that is no OOM was swallowed")
        model = None if loaded is None else self.model_of(loaded)
        placement: Placement | None = None
        own: dict[int, int] = {}
        if model is not None:
            placement = placement_of(model)
            rung = _rung(placement)
            own = self._own_blocks(model)
            if not placement.is_whole:
                problems.append(f"the model is half moved: {placement}")
        elif not rung:
            rung = "nothing"
            problems.append("the loader returned no model and raised nothing")
        left, holders = self._leftovers(
            before | set(own), start + sum(own.values()), problems
        )
        if placement is not None and not is_control:
            self._check_output(loaded, placement, problems)
        return rung, left, holders

    def _leftovers(
        self, known: set[int], base: int, problems: list[str]
    ) -> tuple[int, tuple[str, ...]]:
        """Return the bytes beyond ``base`` that stay, and who holds or held them."""
        holders: tuple[str, ...] = ()
        if allocated_bytes(self.device) > base:
            cycles = find_cycles(self.device, known)
            holders = tuple(str(each) for each in cycles)
            del cycles
        left, logged = settle(self.device, base)
        if left > 0:
            found = find_holders(self.device, known)
            holders += tuple(str(each) for each in found)
            problems.append(f"{format_size(left)} of a failed attempt stay on the card")
        elif logged > 0:
            holders += (
                f"{format_size(logged)} were held by captured log records alone; that is "
                "pytest's log capture, not the code",
            )
        return max(left, 0), holders

    def _judge_error(
        self,
        error: Exception,
        problems: list[str],
        fault: str | None,
        *,
        is_control: bool,
    ) -> None:
        is_oom = is_the_oom(error)
        if is_control:
            return  # whatever came through, it came through
        text = f"{type(error).__name__}: {str(error)[:200]}"
        if not is_oom:
            problems.append(f"it ended in an error that is no OOM: {text}")
        elif fault is None or "persistent" not in fault:
            problems.append(f"it did not recover: {text}")

    def _own_blocks(self, model: torch.nn.Module) -> dict[int, int]:
        """Return the bytes of the model's blocks on cards, by address."""
        own: dict[int, int] = {}
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_cuda:
                storage = tensor.untyped_storage()
                own[storage.data_ptr()] = self.device.block_bytes(storage)
        return own

    def _check_output(
        self, loaded: Any, placement: Placement, problems: list[str]
    ) -> None:
        if self.run is None:
            return
        try:
            output = portrait(self.run(loaded))
        except Exception as error:  # noqa: BLE001  # the verdict is on whatever it is
            problems.append(
                f"the loaded model cannot be run: {type(error).__name__}: "
                f"{str(error)[:200]}"
            )
            clear_exception(error)
            return
        if self.reference is None:
            self.reference = output
        wrong = difference(
            self.reference, output, where="the output", dtypes=placement.dtypes
        )
        if wrong is not None:
            problems.append(wrong)
        del output
        gc.collect()


def _model(loaded: Any) -> Any:
    if isinstance(loaded, torch.nn.Module):
        return loaded
    return getattr(loaded, "model", None)


def _rung(placement: Placement) -> str:
    """Return where a model ended, shortly: devices and dtypes."""
    devices = "+".join(
        "offloaded" if device == "meta" else device
        for device in sorted(placement.devices)
    )
    dtypes = ",".join(
        sorted(str(dtype).removeprefix("torch.") for dtype in placement.dtypes)
    )
    return f"{devices} {dtypes}".strip()
