"""One load of a model, as its judges see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.instruments.equality import Comparison, compare
from pytest_gpumem.instruments.parts import tensors_held_by
from pytest_gpumem.instruments.placement import Placement, placement_of
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.trials import Attempt, Trial
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices import Device
    from pytest_gpumem.rules.rule import Rule

#: Letters of an error's text that a problem shows.
_WORDS = 200


@dataclass(frozen=True, slots=True)
class Load:
    """What one load ended in.

    Attributes:
        attempt: The run.
        model: The model in what the loader returned; None without one.
        placement: Where it is; None without a model.
        compared: Its output beside the reference; None if not compared.
        changed: What of torch's defaults it left changed and the first load did not.
        left_bytes: Bytes on the cards that are not the model's own, at least 0.
        holders: Who holds those, and which reference cycles held more until a collection.
    """

    attempt: Attempt
    model: Any
    placement: Placement | None
    compared: Comparison | None
    changed: tuple[str, ...]
    left_bytes: int
    holders: tuple[str, ...]

    def problems(self) -> list[str]:
        """Return what is wrong with the model and what is left; not with an error."""
        attempt, placement = self.attempt, self.placement
        found = []
        if placement is None and attempt.failure is None:
            found.append("the loader returned no model and raised nothing")
        if placement is not None and not placement.is_whole:
            found.append(
                f"the model is half moved: weights on "
                f"{', '.join(sorted(placement.devices))} and no device map ({placement})"
            )
        if self.left_bytes:
            left = format_size(self.left_bytes)
            found.append(f"{left} of a failed attempt stay on the card")
        found += [f"it leaves torch changed: {each}" for each in self.changed]
        if attempt.output_failure is not None:
            words = attempt.output_failure.words(_WORDS)
            found.append(f"the loaded model cannot be run: {words}")
        if self.compared is not None and self.compared.first is not None:
            found.append(self.compared.first)
        return found

    def over_budget(self) -> list[str]:
        """Return that the load, or the run after it, was over its budget, if it was."""
        budget = self.attempt.budget_bytes
        peak = self.attempt.figures.peak_reserved_bytes
        if budget is None or peak <= budget:
            return []
        return [
            f"its peak of {format_size(peak)} reserved is over the budget of "
            f"{format_size(budget)}"
        ]


class Loader:
    """Loads a model again and again, and runs it.

    Args:
        load: The loader under test.
        run: Computes an output from what it returns; None for none.
        reference: What the output should be; None means that of the first load.
        model_of: Finds the model in what the loader returns.
        device: The cards.
        device_index: The card of budgets and peaks.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        *,
        run: Callable[[Any], Any] | None,
        reference: Any,
        model_of: Callable[[Any], Any],
        device: Device,
        device_index: int,
    ) -> None:
        self._model_of = model_of
        self._run = run
        self._reference = None if reference is None else portrait(reference)
        self._usual: frozenset[str] | None = None
        self._device = device
        self._trial = Trial(
            body=load,
            owns=self._own_blocks,
            then=None if run is None else self._output,
            names_cycles=True,
            device=device,
            device_index=device_index,
        )

    def load(
        self,
        *rules: str | Rule,
        budget_bytes: int | None = None,
        catches: Callable[[BaseException], bool],
        compares: bool = True,
    ) -> Load:
        """Load once, and run what was loaded.

        Args:
            rules: Which allocations of the load fail.
            budget_bytes: What the card may hold, for load and run.
            catches: Tells which errors are part of the verdict.
            compares: Whether the output is held to the reference.
        """
        attempt = self._trial.run(*rules, budget_bytes=budget_bytes, catches=catches)
        model = None if attempt.result is None else self._model_of(attempt.result)
        placement = None if model is None else placement_of(model)
        compared = None
        if placement is not None and compares and attempt.output is not None:
            if self._reference is None:
                self._reference = attempt.output
            compared = compare(
                self._reference,
                attempt.output,
                where="the output",
                dtypes=placement.dtypes,
            )
        if self._usual is None:
            self._usual = attempt.changed
        changed = tuple(sorted(attempt.changed - self._usual))
        left = max(attempt.left_bytes, 0)
        holders = tuple(map(str, attempt.cycles))
        if left:
            holders += self._trial.holders(attempt)
        elif attempt.note:
            holders += (attempt.note,)
        return Load(attempt, model, placement, compared, changed, left, holders)

    def _output(self, loaded: Any) -> Any:
        has_model = loaded is not None and self._model_of(loaded) is not None
        return self._run(loaded) if has_model and self._run is not None else None

    def _own_blocks(self, loaded: Any) -> dict[int, int]:
        """Return the bytes of the model's blocks on cards, by address."""
        model = None if loaded is None else self._model_of(loaded)
        if model is None:
            return {}
        own = {}
        for tensor in tensors_held_by(model):
            if tensor.is_cuda:
                storage = tensor.untyped_storage()
                own[storage.data_ptr()] = self._device.block_bytes(storage)
        return own


def model_in(loaded: Any) -> Any:
    """Return the model in what a loader returns: itself, or its attribute ``model``.

    Of a mapping its entry of that name, else the first module; so of a tuple or list.
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
