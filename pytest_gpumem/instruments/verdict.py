"""Judge how a model was loaded: where it ended, what it computes, what it left."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.instruments.equality import Comparison, compare
from pytest_gpumem.instruments.injector import OomInjector
from pytest_gpumem.instruments.placement import Placement, placement_of
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.recorder import PeakRecorder
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.model.records import MemoryFigures
    from pytest_gpumem.model.rules import Rule


@dataclass(frozen=True, slots=True)
class LoadVerdict:
    """What a load ended in.

    Attributes:
        model: The model, for further questions; None if the load raised.
        placement: Where it is; None if the load raised.
        figures: Peaks of the whole affair, load and run.
        left_bytes: Bytes on the card that are not the model's own after the load.
        output_error: Largest difference from the reference; None if not compared.
        num_injected: Allocations that the rules refused.
        error: What the load raised, as text; None if nothing.
        problems: What is wrong, one sentence each; empty means all is well.
    """

    model: Any
    placement: Placement | None
    figures: MemoryFigures
    left_bytes: int
    output_error: float | None
    num_injected: int
    error: str | None
    problems: tuple[str, ...] = field(default=())

    def check(self) -> None:
        """Raise unless all is well.

        Raises:
            AssertionError: Every problem, one line each, with where the model is.
        """
        if self.problems:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            raise AssertionError(
                f"the load went wrong:\n{lines}\n  model: {self.placement}"
            )


def judge_load(
    load: Callable[[], Any],
    *,
    run: Callable[[Any], torch.Tensor] | None = None,
    reference: torch.Tensor | None = None,
    expect_devices: Sequence[str] | None = None,
    expect_dtype: torch.dtype | None = None,
    expect_error: type[Exception] | None = None,
    rules: Sequence[str | Rule] = (),
    device_index: int = 0,
    device: Device | None = None,
) -> LoadVerdict:
    """Run a loader, with faults if wanted, and judge what came out.

    Args:
        load: The loader under test; returns a model.
        run: Computes an output from the model, to be compared with ``reference``.
        reference: What a model on the CPU in fp32 computes, shape as ``run``'s.
        expect_devices: Where the weights should be, for example ``["cuda:0"]``;
            offloaded weights are on ``"meta"``.
        expect_dtype: The dtype that the parameters should have.
        expect_error: An error that is no OOM and that the load must let through.
        rules: Injection rules in force during the load.
        device_index: The card.
        device: Where; None means the active device.

    Returns:
        The verdict; ``verdict.check()`` raises if anything is wrong.

    Limits: an error that is neither an OOM nor the expected one is not caught.
    """
    device = active_device() if device is None else device
    device.empty_cache()
    before = device.memory_stats(device_index).get("allocated_bytes.all.current", 0)
    model: Any = None
    error: str | None = None
    came_through = False
    expected_errors = () if expect_error is None else (expect_error,)
    with PeakRecorder(device_index=device_index, device=device) as recorder:
        with OomInjector(*rules, device=device) as injector:
            try:
                model = load()
            except torch.OutOfMemoryError as oom:
                error = str(oom)
            except expected_errors as expected:
                error = str(expected)
                came_through = True
        left = _left_bytes(device, device_index, model) - before
        compared: Comparison | None = None
        if model is not None and run is not None and reference is not None:
            compared = compare(
                portrait(reference),
                portrait(run(model)),
                where="the output",
                dtypes=placement_of(model).dtypes,
            )
    verdict = LoadVerdict(
        model=model,
        placement=None if model is None else placement_of(model),
        figures=recorder.figures,
        left_bytes=left,
        output_error=None if compared is None else compared.largest,
        num_injected=injector.num_injected,
        error=error,
    )
    if expect_error is not None:
        name = expect_error.__name__
        missing = f"a {name} should have come through and did not"
        return replace(verdict, problems=() if came_through else (missing,))
    problems = _problems(verdict, expect_devices, expect_dtype)
    if compared is not None and compared.first is not None:
        problems.append(compared.first)
    problems += _over_budget(verdict, device.budget(device_index))
    return replace(verdict, problems=tuple(problems))


def _over_budget(verdict: LoadVerdict, budget: int | None) -> list[str]:
    peak = verdict.figures.peak_reserved_bytes
    if budget is None or peak <= budget:
        return []
    return [
        f"the peak of {format_size(peak)} reserved is above the budget of "
        f"{format_size(budget)}"
    ]


def _problems(
    verdict: LoadVerdict,
    expect_devices: Sequence[str] | None,
    expect_dtype: torch.dtype | None,
) -> list[str]:
    placement = verdict.placement
    if placement is None:
        return [f"the load ended in an OOM: {verdict.error}"]
    problems = []
    if not placement.is_whole:
        problems.append(
            f"the model is half moved: weights on {', '.join(sorted(placement.devices))}"
            " and no device map"
        )
    if expect_devices is not None and placement.devices != set(expect_devices):
        problems.append(
            f"the weights are on {', '.join(sorted(placement.devices))}, expected "
            f"{', '.join(sorted(expect_devices))}"
        )
    if expect_dtype is not None and placement.dtypes != {expect_dtype}:
        dtypes = ", ".join(sorted(str(dtype) for dtype in placement.dtypes))
        problems.append(f"the weights are {dtypes}, expected {expect_dtype}")
    if verdict.left_bytes:
        problems.append(
            f"{format_size(verdict.left_bytes)} of a failed attempt stay on the card"
        )
    return problems


def _left_bytes(device: Device, device_index: int, model: Any) -> int:
    """Return the card's allocated bytes that are neither the model's nor cuBLAS's."""
    device.empty_cache()
    allocated = device.memory_stats(device_index).get("allocated_bytes.all.current", 0)
    own = {}
    if isinstance(model, torch.nn.Module):
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_cuda and tensor.device.index == device_index:
                storage = tensor.untyped_storage()
                own[storage.data_ptr()] = storage
    return allocated - sum(device.block_bytes(storage) for storage in own.values())
