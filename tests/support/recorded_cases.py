"""Run the recorded cases of bert-large on a simulated card, and return its figures."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch

from pytest_gpumem.cards import find_card
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.recording.workload import FIGURES

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.machine import SimulatedMachine

RECORDINGS: Final = Path(__file__).parents[1] / "recordings"
CASES: Final[list[dict[str, Any]]] = json.loads(
    (RECORDINGS / "bert_large_allocator.json").read_text(encoding="utf-8")
)["cases"]
DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16}


def name_of(case: dict[str, Any]) -> str:
    """Return a case's settings on a line."""
    return " ".join(str(value) for value in case["case"].values())


def total_bytes(case: dict[str, Any]) -> int:
    """Return the size of a case's card."""
    total = case["case"].get("total", 16 * 2**30)
    return total if isinstance(total, int) else int(total[:-1]) * 2**30


def simulate(
    path: Path, case: dict[str, Any], *, values: str = "none"
) -> dict[str, Any]:
    """Do on a simulated card what a case did.

    Without values what depends on them is said: the mask hides nothing.

    Args:
        path: bert-large's checkpoint.
        case: The case.
        values: What the card keeps of tensors.

    Returns:
        Figures by phase; ``oom`` or ``error`` where it ended in one, as text.
    """
    settings = case["case"]
    card = find_card(f"{total_bytes(case)},cc={settings.get('cc', '8.0')}")
    use = {"load": load_only, "infer": infer, "train": train}[settings["phase"]]
    seen: dict[str, Any] = {}
    masks = "transformers.masking_utils._ignore_bidirectional_mask_sdpa"
    # A mock with a return value would keep the masks that it is called with.
    hides_nothing = mock.patch(masks, lambda *_args, **_options: True)  # noqa: PT008
    with simulated_device(card, values=values) as machine, hides_nothing:
        try:
            use(path, settings, Notes(machine, seen))
        except torch.OutOfMemoryError as error:
            seen["oom"] = str(error)
        except RuntimeError as error:
            seen["error"] = f"{type(error).__name__}: {error}"
        gc.collect()
    return seen


class Notes:
    """Notes a phase's figures.

    Args:
        machine: Whose first card to read.
        seen: Where to write.
    """

    def __init__(self, machine: SimulatedMachine, seen: dict[str, Any]) -> None:
        self._machine = machine
        self._seen = seen

    def __call__(self, phase: str) -> None:
        """Read the figures, and let the next phase begin."""
        stats = self._machine.cards[0].memory_stats()
        self._seen[phase] = {name: stats[key] for name, key in FIGURES.items()}
        torch.cuda.reset_peak_memory_stats()


def load(path: Path, settings: dict[str, Any]) -> Any:
    """Load the model as a case did."""
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"dtype": DTYPES[settings["dtype"]]}
    if "attn" in settings:
        options["attn_implementation"] = settings["attn"]
    from_pretrained = AutoModelForSequenceClassification.from_pretrained
    if settings["load"] == "to":
        return from_pretrained(path, **options).to("cuda")
    return from_pretrained(path, **options, device_map="cuda:0")


def load_only(path: Path, settings: dict[str, Any], note: Notes) -> None:
    """Load."""
    model = load(path, settings)
    note("load")
    del model


def inputs(settings: dict[str, Any]) -> dict[str, Any]:
    """Return 8 x 128 tokens on the card, their mask if there is one, and labels."""
    found = {"input_ids": torch.ones(8, 128, dtype=torch.int64).cuda()}
    if settings.get("mask") != "none":
        found["attention_mask"] = torch.ones(8, 128, dtype=torch.int64).cuda()
    return {**found, "labels": torch.ones(8, dtype=torch.int64).cuda()}


def infer(path: Path, settings: dict[str, Any], note: Notes) -> None:
    """Load and pass twice; what the first pass gave is there during the second."""
    with torch.no_grad():
        model = load(path, settings)
        note("load")
        given = inputs(settings)
        labels = given.pop("labels")
        note("inputs")
        result = None
        for phase in ("forward_1", "forward_2"):
            result = model(**given).logits
            note(phase)
        del labels, result


def train(path: Path, settings: dict[str, Any], note: Notes) -> None:
    """Load and make three steps with AdamW."""
    model = load(path, settings)
    note("load")
    given = inputs(settings)
    note("inputs")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for step in range(1, 4):
        output = model(**given)
        note(f"forward_{step}")
        output.loss.backward()
        note(f"backward_{step}")
        optimizer.step()
        note(f"step_{step}")
        optimizer.zero_grad()
        note(f"zero_grad_{step}")
