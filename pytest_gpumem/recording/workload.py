"""A BERT classifier's load, inference and training, and the bytes after each step."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.recording.facts import free_everything

if TYPE_CHECKING:
    from pathlib import Path

BATCH: Final = 8
TOKENS: Final = 128
STEPS: Final = 2
#: A phase's figures and the statistic each one shows.
FIGURES: Final = {
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
    "peak_allocated": "allocated_bytes.all.peak",
    "peak_reserved": "reserved_bytes.all.peak",
    "requested": "requested_bytes.all.current",
    "segments": "segment.all.current",
}


class Plan(NamedTuple):
    """One way to load and use the model.

    Attributes:
        load: ``"to"`` (to the host, then to the card) or ``"device_map"``.
        dtype: Name of the weights' dtype.
        attention: ``"eager"`` or ``"sdpa"``.
        use: ``"infer"`` or ``"train"`` (AdamW, ``STEPS`` steps).
    """

    load: str
    dtype: str
    attention: str
    use: str


PLANS: Final = (
    Plan("to", "float32", "eager", "infer"),
    Plan("device_map", "float32", "sdpa", "infer"),
    Plan("device_map", "float16", "sdpa", "infer"),
    Plan("to", "float16", "eager", "infer"),
    Plan("to", "float32", "eager", "train"),
    Plan("to", "float32", "sdpa", "train"),
    Plan("to", "float16", "sdpa", "train"),
)


def measure(path: Path, plan: Plan) -> dict[str, Any]:
    """Carry out a plan on the current card, from an empty one.

    Args:
        path: A classifier's checkpoint.
        plan: The plan.

    Returns:
        The plan, and for each phase the figures after it, in bytes, with the peaks since
        the phase before; ``oom`` with the error's text if a phase did not fit.
    """
    free_everything()
    base = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    phases: dict[str, dict[str, int]] = {}
    answer: dict[str, Any] = {"plan": plan._asdict(), "phases": phases}

    def note(phase: str) -> None:
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        phases[phase] = {name: stats[key] for name, key in FIGURES.items()}
        torch.cuda.reset_peak_memory_stats()

    try:
        _carry_out(path, plan, note)
    except torch.OutOfMemoryError as error:
        answer["oom"] = str(error)
    gc.collect()
    free_everything()
    answer["base"] = {"allocated": base[0], "reserved": base[1]}
    return answer


def _carry_out(path: Path, plan: Plan, note: Any) -> None:
    from transformers import (
        AutoModelForSequenceClassification,
    )

    load: Any = AutoModelForSequenceClassification.from_pretrained
    options = {
        "dtype": getattr(torch, plan.dtype),
        "attn_implementation": plan.attention,
    }
    where = {} if plan.load == "to" else {"device_map": "cuda:0"}
    model = load(path, **options, **where)
    if plan.load == "to":
        model = model.to("cuda")
    note("load")
    tokens = torch.ones(BATCH, TOKENS, dtype=torch.int64).cuda()
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64).cuda()
    labels = torch.ones(BATCH, dtype=torch.int64).cuda()
    note("inputs")
    if plan.use == "infer":
        model.eval()
        result = None
        with torch.no_grad():
            for step in range(1, STEPS + 1):
                result = model(tokens, attention_mask=mask).logits
                note(f"forward_{step}")
        del result
        return
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for step in range(1, STEPS + 1):
        loss = model(tokens, attention_mask=mask, labels=labels).loss
        note(f"forward_{step}")
        loss.backward()
        note(f"backward_{step}")
        optimizer.step()
        note(f"step_{step}")
        optimizer.zero_grad()
        note(f"zero_grad_{step}")
