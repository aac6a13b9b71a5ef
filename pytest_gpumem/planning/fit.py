"""Finds the cards that a model fits on: runs a task on each, simulated without values."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.cards import find_card
from pytest_gpumem.checkpoints.models import model_spec
from pytest_gpumem.devices.simulated.device import SimulatedDevice
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import PlanError
from pytest_gpumem.planning.kinds import PeakByKind
from pytest_gpumem.planning.task import FitTask, build, run_task

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from pytest_gpumem.cards_table import Card
    from pytest_gpumem.checkpoints.models import ModelSpec

#: The default cards: those that are common in clouds and workstations.
DEFAULT_CARDS: Final = "T4,L4,RTX-4090,A100-40GB,A100-80GB"
#: Bytes of a card on which every task fits, to measure the bytes that a task needs.
_ROOM: Final = 2**46
#: The largest batch that is tried.
MAX_BATCH: Final = 4096


@dataclass(frozen=True, slots=True)
class Needs:
    """The bytes that a task needs on a card with enough room.

    Attributes:
        allocated_bytes: Most bytes in live tensors at once.
        reserved_bytes: Most bytes that PyTorch holds of the card.
        context_bytes: Bytes of the process's CUDA context.
        kinds: ``allocated_bytes``, by kind.
    """

    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    kinds: dict[str, int]

    @property
    def total_bytes(self) -> int:
        """The bytes that the process holds of the card."""
        return self.reserved_bytes + self.context_bytes


@dataclass(frozen=True, slots=True)
class CardFit:
    """The result of a task on one card.

    Attributes:
        card: The card's name.
        total_bytes: Its memory in bytes.
        fits: Whether the task ended without running out of memory.
        needs: The bytes that the task needs on such a card with more memory.
        ran_out_in: The stage in which memory ran out; empty if the task fits.
        largest_batch: The largest batch that fits, 0 if not even one row does; None
            if it was not searched for.
        helps: Changes that make the task fit, if it does not.
    """

    card: str
    total_bytes: int
    fits: bool
    needs: Needs
    ran_out_in: str = ""
    largest_batch: int | None = None
    helps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FitReport:
    """The results of a model's task on several cards.

    Attributes:
        model: The model's name.
        num_parameters: The number of its parameters.
        task: The task.
        cards: The results, in the order of the cards.
    """

    model: str
    num_parameters: int
    task: FitTask
    cards: tuple[CardFit, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values; sizes are bytes."""
        return asdict(self)


def fit_model(
    model: str | os.PathLike[str] | PretrainedConfig,
    task: FitTask | None = None,
    *,
    cards: str = DEFAULT_CARDS,
    largest_batch: bool = True,
    architecture: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> FitReport:
    """Return on which cards a model can do a task, and what takes the memory.

    Each card is simulated without values, so that a model may be larger than the host's
    memory. Bytes that the simulation does not model, such as cuDNN's workspaces, are not
    counted; see ``docs/exactness.md``.

    Args:
        model: A known name, a ``config.json`` of transformers or a folder with one, or
            a config.
        task: The task; by default one forward of 1 x 128 tokens.
        cards: Names of cards, separated by commas, each as ``--gpu-card`` takes it.
        largest_batch: Whether to search for the largest batch that fits.
        architecture: The model's class in transformers; by default that of its config.
        progress: Called with a sentence before each card.

    Raises:
        CardError: A card is not known.
        CheckpointError: The model is not known.
        PlanError: The task makes no sense, or the model cannot do it.

    Example::

        report = fit_model("bert-large", FitTask("train", batch=8, seq=512), cards="T4,L4")
        assert not report.cards[0].fits
    """
    task = FitTask() if task is None else task
    spec = model_spec(model, architecture=architecture)
    found = [_one_card(each) for each in _descriptions(cards)]
    if not found:
        raise PlanError(
            f"cards={cards!r} names no card; give for example T4,L4", value=cards
        )
    fits = []
    for card in found:
        if progress is not None:
            progress(f"{spec.name} on {card.name}: {task.describe()}")
        fits.append(_try_card(spec, task, card, largest_batch=largest_batch))
    return FitReport(spec.name, _count(spec, task), task, tuple(fits))


def _descriptions(cards: str) -> list[str]:
    """Return the descriptions of cards in a text: ``T4,16GiB,cc=8.0`` names two."""
    found: list[str] = []
    for part in filter(None, (each.strip() for each in cards.split(","))):
        if "=" in part and found:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _one_card(text: str) -> Card:
    cards = find_card(text)
    if len(cards) != 1:
        raise PlanError(
            f"{text!r} is {len(cards)} cards; a model is tried on one at a time",
            value=text,
        )
    return cards[0]


def _count(spec: ModelSpec, task: FitTask) -> int:
    return sum(each.numel() for each in build(spec, task).parameters())


def _measure(spec: ModelSpec, task: FitTask, card: Card) -> tuple[Needs, str]:
    """Return a task's bytes, and the stage in which memory ran out; empty if it fits."""
    with simulated_device([card], values="none") as machine:
        device = SimulatedDevice(machine)
        ran_out_in = ""
        kinds = PeakByKind(device)
        with device.tracing(kinds.trace):
            try:
                run_task(spec, task, kinds)
            except torch.OutOfMemoryError:
                ran_out_in = kinds.stage
            gc.collect()
            statistics = device.memory_stats(0)
            needs = Needs(
                statistics.get("allocated_bytes.all.peak", 0),
                statistics.get("reserved_bytes.all.peak", 0),
                device.context_bytes(0),
                kinds.at_peak(),
            )
    return needs, ran_out_in


def _try_card(
    spec: ModelSpec, task: FitTask, card: Card, *, largest_batch: bool
) -> CardFit:
    needs, ran_out_in = _measure(spec, task, card)
    fits = not ran_out_in
    if not fits:
        context = card.context_bytes
        wide = replace(card, total_bytes=_ROOM, given_context_bytes=context)
        needs, _nowhere = _measure(spec, task, wide)
    largest = None
    if largest_batch and task.kind != "load":
        largest = _Batches(spec, task, card, needs, fits=fits).largest()
    helps = () if fits else tuple(_helps(spec, task, card, largest))
    return CardFit(card.name, card.total_bytes, fits, needs, ran_out_in, largest, helps)


class _Batches:
    """Runs of a task on one card with more and fewer rows.

    Args:
        spec: The model.
        task: The task.
        card: The card.
        needs: The bytes that the unchanged task needs.
        fits: Whether the unchanged task fits.
    """

    def __init__(
        self, spec: ModelSpec, task: FitTask, card: Card, needs: Needs, *, fits: bool
    ) -> None:
        self._spec, self._task, self._card = spec, task, card
        self._needs = {task.batch: needs.total_bytes}
        self._good, self._bad = (task.batch, MAX_BATCH + 1) if fits else (0, task.batch)

    def largest(self) -> int:
        """Return the largest batch that fits; if it has many rows, to one part in 32.

        Each row needs nearly the same memory, so two runs are enough for an estimate.
        """
        task = self._task
        if self._bad > 1:
            self._try(task.batch * 2 if self._good else max(1, task.batch // 2))
        while self._bad - self._good > max(1, self._good // 32):
            wanted = min(max(self._guess(), self._good + 1), self._bad - 1)
            if self._try(wanted):
                self._try(self._good + max(1, self._good // 32))
        return self._good

    def _try(self, batch: int) -> bool:
        if not self._good < batch < self._bad:
            return False
        needs, ran_out_in = _measure(
            self._spec, self._task.with_batch(batch), self._card
        )
        if ran_out_in:
            self._bad = batch
            return False
        self._good = batch
        self._needs[batch] = needs.total_bytes
        return True

    def _guess(self) -> int:
        """Return the batch that would fill the card, on a line through two runs."""
        if len(self._needs) == 1:
            return (self._good + self._bad) // 2
        (low, least), (high, most) = sorted(self._needs.items())[-2:]
        of_row = max((most - least) // (high - low), 1)
        guess = high + (self._card.total_bytes - most) // of_row
        # The line gives no batch between the two bounds, so the middle is tried.
        is_inside = self._good < guess < self._bad
        return guess if is_inside else (self._good + self._bad) // 2


def _helps(
    spec: ModelSpec, task: FitTask, card: Card, largest: int | None
) -> list[str]:
    """Return the changes that make a task fit.

    A combination is returned only if no single change is enough.
    """
    half = "bfloat16" if card.compute_capability >= (8, 0) else "float16"
    alone: dict[str, FitTask] = {}
    if task.kind == "train" and not task.checkpointing:
        alone["gradient checkpointing"] = replace(task, checkpointing=True)
    if task.dtype == "float32":
        alone[half] = replace(task, dtype=half)
    both = replace(task, dtype=half, checkpointing=True)
    found = [name for name, each in alone.items() if _is_enough(spec, each, card)]
    if not found and len(alone) > 1 and _is_enough(spec, both, card):
        found = [" and ".join(alone)]
    return [*found, f"a batch of {largest}"] if largest else found


def _is_enough(spec: ModelSpec, task: FitTask, card: Card) -> bool:
    with suppress(PlanError):  # the model does not support the change
        return not _measure(spec, task, card)[1]
    return False
