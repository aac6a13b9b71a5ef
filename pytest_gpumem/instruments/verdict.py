"""Judge how a model was loaded: where it ended, what it computes, what it left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.instruments.loads import Loader, model_in
from pytest_gpumem.instruments.trials import is_the_oom
from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.rules.rule import NOT_OOM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.instruments.placement import Placement
    from pytest_gpumem.records.memory import MemoryFigures
    from pytest_gpumem.rules.rule import Rule


@dataclass(frozen=True, slots=True)
class LoadVerdict:
    """What a load ended in.

    Attributes:
        model: The model, for further questions; None if the load raised.
        placement: Where it is; None if the load raised.
        figures: Peaks of the whole affair, load and run.
        left_bytes: Bytes on the cards after the load that were not there before and
            are not the model's own.
        output_error: Largest difference from the reference; None if not compared.
        num_injected: Allocations that the rules refused.
        error: What the load raised, as text; None if nothing.
        problems: What is wrong, one sentence each; empty means all is well.
        holders: Who holds what is left, and which reference cycles held more until a
            collection.
    """

    model: Any
    placement: Placement | None
    figures: MemoryFigures
    left_bytes: int
    output_error: float | None
    num_injected: int
    error: str | None
    problems: tuple[str, ...] = field(default=())
    holders: tuple[str, ...] = field(default=())

    def check(self) -> None:
        """Raise unless all is well.

        Raises:
            AssertionError: Every problem, one line each, with where the model is.
        """
        if self.problems:
            lines = "\n".join(
                [f"  - {problem}" for problem in self.problems]
                + [f"    {holder}" for holder in self.holders]
            )
            raise AssertionError(
                f"the load went wrong:\n{lines}\n  model: {self.placement}"
            )


def judge_load(
    load: Callable[[], Any],
    *,
    run: Callable[[Any], Any] | None = None,
    reference: Any = None,
    expect_devices: Sequence[str] | None = None,
    expect_dtype: torch.dtype | None = None,
    expect_error: type[Exception] | None = None,
    rules: Sequence[str | Rule] = (),
    model_of: Callable[[Any], Any] | None = None,
    device_index: int = 0,
    device: Device | None = None,
) -> LoadVerdict:
    """Run a loader, with faults if wanted, and judge what came out.

    Args:
        load: The loader under test; returns a model, or an object with one.
        run: Computes an output from what ``load`` returns, to be compared with
            ``reference``.
        reference: What a model on the CPU in fp32 computes, shape as ``run``'s.
        expect_devices: Where the weights should be, for example ``["cuda:0"]``;
            offloaded weights are on ``"meta"``.
        expect_dtype: The dtype that the parameters should have.
        expect_error: An error that is no OOM and that the load must let through.
        rules: Injection rules in force during the load.
        model_of: Finds the model in what ``load`` returns; None means itself, or its
            attribute ``model``.
        device_index: The card.
        device: Where; None means the active device.

    Returns:
        The verdict; ``verdict.check()`` raises if anything is wrong.

    Limits: an error of the load that is neither an OOM nor the expected one is not
    caught; one of ``run`` is a problem.
    """
    loader = Loader(
        load,
        run=run if reference is not None else None,
        reference=reference,
        model_of=model_of or model_in,
        device=active_device() if device is None else device,
        device_index=device_index,
    )
    parsed = [parse_rule(each) if isinstance(each, str) else each for each in rules]
    is_control = any(rule.flavour == NOT_OOM for rule in parsed)
    expected = () if expect_error is None else (expect_error,)

    def catches(error: BaseException) -> bool:
        is_oom = (
            isinstance(error, torch.OutOfMemoryError)
            if is_control
            else is_the_oom(error)
        )
        return is_oom or isinstance(error, expected)

    done = loader.load(*parsed, catches=catches)
    failure = done.attempt.failure
    if expect_error is not None:
        name = expect_error.__name__
        came_through = failure is not None and issubclass(failure.kind, expect_error)
        missing = f"a {name} should have come through and did not"
        problems = [] if came_through else [missing]
    elif failure is not None:
        problems = [f"the load ended in an OOM: {failure.text}"]
        problems += done.problems() + done.over_budget()
    else:
        is_swallowed = is_control and done.attempt.num_injected
        problems = ["an error that is no OOM was swallowed"] if is_swallowed else []
        problems += done.problems()
        problems += _unexpected(done.placement, expect_devices, expect_dtype)
        problems += done.over_budget()
    return LoadVerdict(
        model=done.model,
        placement=done.placement,
        figures=done.attempt.figures,
        left_bytes=done.left_bytes,
        output_error=None if done.compared is None else done.compared.largest,
        num_injected=done.attempt.num_injected,
        error=None if failure is None else failure.text,
        problems=tuple(problems),
        holders=done.holders,
    )


def _unexpected(
    placement: Placement | None,
    devices: Sequence[str] | None,
    dtype: torch.dtype | None,
) -> list[str]:
    """Return where a model is, and of which dtype, if that is not what was expected."""
    if placement is None:
        return []
    problems = []
    if devices is not None and placement.devices != set(devices):
        problems.append(
            f"the weights are on {', '.join(sorted(placement.devices))}, expected "
            f"{', '.join(sorted(devices))}"
        )
    if dtype is not None and placement.dtypes != {dtype}:
        dtypes = ", ".join(sorted(str(each) for each in placement.dtypes))
        problems.append(f"the weights are {dtypes}, expected {dtype}")
    return problems
