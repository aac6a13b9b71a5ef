"""Judges a load: the model's devices, its output, and the bytes that the load left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.instruments.equality import compare_portraits
from pytest_gpumem.instruments.module_parts import (
    Placement,
    placement_of,
    tensors_held_by,
)
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.trials import Failure, Trial, is_an_oom, is_the_oom
from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.rules.rule import NOT_OOM
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.records.memory_figures import MemoryFigures
    from pytest_gpumem.rules.rule import Rule

#: The most characters of an error's text that a problem shows.
ERROR_CHARACTERS: Final = 200
#: The beginnings of problems: about the model's devices, about running it, and about its
#: output.
HALF_MOVED: Final = "the model is half moved"
CANNOT_RUN: Final = "the loaded model cannot be run"
OUTPUT: Final = "the output"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadVerdict:
    """The result of a load.

    Attributes:
        model: The model, for further checks; None if the load raised.
        placement: The model's devices and dtypes; None if the load raised.
        figures: The peaks of load and run together.
        left_bytes: Bytes that the load added to the cards and that do not belong to the
            model; at least 0.
        output_error: Largest difference from the reference; None if not compared.
        num_injected: The number of allocations that the rules made fail.
        num_ooms: The number of failed allocations: how often the load had to retry.
        failure: The error of the load, in words; None if it did not raise.
        problems: What is wrong, one sentence each; empty if nothing is wrong.
        holders: What holds the bytes that are left, and which reference cycles held more
            bytes until a garbage collection.
    """

    model: Any
    placement: Placement | None
    figures: MemoryFigures
    left_bytes: int
    output_error: float | None
    num_injected: int
    num_ooms: int
    failure: Failure | None
    problems: tuple[str, ...]
    holders: tuple[str, ...]

    @property
    def error(self) -> str | None:
        """The text of the load's error; None if it did not raise."""
        return None if self.failure is None else self.failure.text

    def check(self) -> None:
        """Raise if there are problems.

        Raises:
            AssertionError: The text has each problem on a line, and the model's
                devices.
        """
        if self.problems:
            lines = ["the load went wrong:"]
            lines += [f"  - {problem}" for problem in self.problems]
            lines += [f"    {holder}" for holder in self.holders]
            raise AssertionError("\n".join([*lines, f"  model: {self.placement}"]))


class Loader:
    """Loads a model again and again, and runs it; see ``check_fallback``.

    Without a reference, each output is compared with that of the first load.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        run: Callable[[Any], Any] | None,
        reference: Any,
        model_of: Callable[[Any], Any] | None,
        variants: bool = False,
        device: Device | None,
        device_index: int,
    ) -> None:
        self._model_of = model_of or model_in
        self._run = run
        self._reference = None if reference is None else portrait(reference)
        self._variants = variants
        self._first: Placement | None = None
        #: The defaults of torch that every load changes.
        self._usual: frozenset[str] | None = None
        self._device = active_device() if device is None else device
        self._trial = Trial(
            body=load,
            owns=self._own_blocks,
            then=None if run is None else self._output,
            names_cycles=True,
            device=self._device,
            device_index=device_index,
        )

    def load(
        self,
        *rules: Rule,
        budget_bytes: int | None = None,
        catches: Callable[[BaseException], bool],
    ) -> LoadVerdict:
        """Load once, and run what was loaded.

        The verdict has problems of the model and of the bytes that are left. The caller
        decides whether an error is a problem. The arguments are those of ``Trial.run``.
        """
        attempt = self._trial.run(*rules, budget_bytes=budget_bytes, catches=catches)
        model = None if attempt.result is None else self._model_of(attempt.result)
        placement = None if model is None else placement_of(model)
        self._first = self._first or placement
        left = max(attempt.left_bytes, 0)
        problems = []
        is_control = attempt.num_injected and is_no_oom(*rules)
        if is_control and attempt.failure is None:
            problems.append("an error that is not an OOM was swallowed")
        if placement is None and attempt.failure is None:
            problems.append("the loader returned no model and raised nothing")
        problems += [] if placement is None else half_moved(placement)
        if left:
            problems.append(f"{format_size(left)} of a failed attempt stay on the card")
        if self._usual is None:
            self._usual = attempt.changed
        problems += [
            f"it leaves torch changed: {each}"
            for each in sorted(attempt.changed - self._usual)
        ]
        if attempt.output_failure is not None:
            words = attempt.output_failure.words(ERROR_CHARACTERS)
            problems.append(f"{CANNOT_RUN}: {words}")
        output_error = None
        is_other = self._variants and self.is_variant(placement)
        if (
            placement is not None
            and not is_control
            and not is_other
            and attempt.output is not None
        ):
            if self._reference is None:
                self._reference = attempt.output
            first, output_error = compare_portraits(
                self._reference,
                attempt.output,
                where=OUTPUT,
                dtypes=placement.dtypes,
            )
            problems += [] if first is None else [first]
        budget, peak = attempt.budget_bytes, attempt.figures.peak_reserved_bytes
        if budget is not None and peak > budget:
            problems.append(
                f"its peak of {format_size(peak)} reserved is over the budget of "
                f"{format_size(budget)}"
            )
        holders = self._trial.holders(attempt) if left else (attempt.note,)
        return LoadVerdict(
            model=model,
            placement=placement,
            figures=attempt.figures,
            left_bytes=left,
            output_error=output_error,
            num_injected=attempt.num_injected,
            num_ooms=attempt.num_ooms,
            failure=attempt.failure,
            problems=tuple(problems),
            holders=(*attempt.cycles, *filter(None, holders)),
        )

    def is_variant(self, placement: Placement | None) -> bool:
        """Tell whether a model's number of parameters differs from the first model's."""
        first = placement if self._first is None else self._first
        return (
            placement is not None
            and first is not None
            and placement.num_parameters != first.num_parameters
        )

    def _output(self, loaded: Any) -> Any:
        has_model = loaded is not None and self._model_of(loaded) is not None
        return self._run(loaded) if has_model and self._run is not None else None

    def _own_blocks(self, loaded: Any) -> dict[int, int]:
        """Return the bytes of the model's blocks on cards, by address."""
        model = None if loaded is None else self._model_of(loaded)
        if model is None:
            return {}
        on_cards = (each for each in tensors_held_by(model) if each.is_cuda)
        storages = [each.untyped_storage() for each in on_cards]
        return {each.data_ptr(): self._device.block_bytes(each) for each in storages}


def half_moved(placement: Placement) -> list[str]:
    """Return a problem if a model is only partly on a card, otherwise none."""
    if placement.is_whole:
        return []
    devices = ", ".join(sorted(placement.devices))
    return [f"{HALF_MOVED}: weights on {devices} and no device map ({placement})"]


def is_no_oom(*rules: Rule) -> bool:
    """Tell whether any rule raises an error that is not an OOM."""
    return any(rule.flavour == NOT_OOM for rule in rules)


def model_in(loaded: Any) -> Any:
    """Return the model in a loader's result: the result itself, or its attribute ``model``.

    In a mapping the model is the entry ``"model"``, or the first module if there is no such
    entry. In a tuple or list it is the first module.
    """
    if isinstance(loaded, torch.nn.Module):
        return loaded
    found = getattr(loaded, "model", None)
    if found is not None:
        return found
    parts: Any = ()
    if isinstance(loaded, Mapping):
        parts = [loaded.get("model"), *loaded.values()]
    elif isinstance(loaded, (list, tuple)):
        parts = loaded
    return next((each for each in parts if isinstance(each, torch.nn.Module)), None)


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
    """Run a loader, with faults if there are rules, and judge the result.

    Args:
        load: The loader under test; returns a model, or an object with one.
        run: Computes an output from what ``load`` returns, to be compared with
            ``reference``.
        reference: The output of the model on the CPU in fp32, of the same shape as that of
            ``run``.
        expect_devices: Where the weights should be, for example ``["cuda:0"]``;
            offloaded weights are on ``"meta"``.
        expect_dtype: The dtype that the parameters should have.
        expect_error: An error that is not an OOM and that the load must let through.
        rules: Injection rules in force during the load.
        model_of: Finds the model in what ``load`` returns; None means the returned object
            itself, or its attribute ``model``.
        device_index: The card.
        device: The device; None means the active device.

    Returns:
        The verdict; ``verdict.check()`` raises if anything is wrong.

    Limits: an error of ``load`` that is neither an OOM nor the expected error reaches the
    caller. An error of ``run`` becomes a problem of the verdict.
    """
    loader = Loader(
        load,
        run=run if reference is not None else None,
        reference=reference,
        model_of=model_of,
        device=device,
        device_index=device_index,
    )
    parsed = [parse_rule(each) if isinstance(each, str) else each for each in rules]
    expected = () if expect_error is None else (expect_error,)

    def catches(error: BaseException) -> bool:
        is_oom = is_an_oom(error) if is_no_oom(*parsed) else is_the_oom(error)
        return is_oom or isinstance(error, expected)

    verdict = loader.load(*parsed, catches=catches)
    failure, problems = verdict.failure, list(verdict.problems)
    if expect_error is not None:
        came_through = failure is not None and issubclass(failure.kind, expect_error)
        missing = f"a {expect_error.__name__} should have come through and did not"
        problems = [] if came_through else [missing]
    elif failure is not None:
        problems.insert(0, f"the load ended in an OOM: {failure.text}")
    else:
        problems += _unexpected(verdict.placement, expect_devices, expect_dtype)
    return replace(verdict, problems=tuple(problems))


def _unexpected(
    placement: Placement | None,
    devices: Sequence[str] | None,
    dtype: torch.dtype | None,
) -> list[str]:
    """Return a problem if a model's devices or dtypes are not the expected ones."""
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
