"""A loader with a fallback ladder: the best rung that the card has room for.

    cuda fp32 -> cuda fp16 -> device_map="auto" with offload -> a smaller model -> cpu

This is user code: nothing in it knows of pytest-gpumem.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSequenceClassification

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True)
class Loaded:
    """A model and the rung of the ladder that it came from."""

    model: Any
    rung: str


def load_model(path: Path, smaller: Path) -> Loaded:
    """Load a classifier on the highest rung that fits.

    Args:
        path: The checkpoint.
        smaller: A smaller checkpoint, for when not even offloading helps.

    Raises:
        torch.OutOfMemoryError: Never: the last rung needs no card.
    """
    for rung, load in _rungs(path, smaller):
        try:
            model = load()
        except torch.OutOfMemoryError:
            # The error's traceback still holds the half-loaded model here. It goes
            # when this block ends; only then is there anything to give back.
            model = None
        if model is not None:
            return Loaded(model.eval(), rung)
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("unreachable: the CPU rung does not run out of VRAM")


def _rungs(path: Path, smaller: Path) -> list[tuple[str, Callable[[], Any]]]:
    return [
        ("cuda fp32", lambda: _load(path, device_map="cuda:0")),
        ("cuda fp16", lambda: _load(path, device_map="cuda:0", dtype=torch.float16)),
        ("offload", lambda: _load_offloaded(path)),
        ("smaller", lambda: _load(smaller, device_map="cuda:0", dtype=torch.float16)),
        ("cpu", lambda: _load(path)),
    ]


def _load(path: Path, **options: Any) -> Any:
    options.setdefault("dtype", torch.float32)
    return AutoModelForSequenceClassification.from_pretrained(path, **options)


def _load_offloaded(path: Path) -> Any:
    """Spread the model over card and host; None if too little fits on the card."""
    model = _load(path, device_map="auto", dtype=torch.float16)
    on_card = sum(p.numel() for p in model.parameters() if p.is_cuda)
    return model if on_card >= 0.25 * model.num_parameters() else None


def classify(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a batch, on the CPU in fp32.

    Args:
        model: Any rung's model.
        token_ids: Shape ``(batch, length)``, on the CPU.

    Returns:
        Shape ``(batch, labels)``.
    """
    device = "cuda" if any(p.is_cuda for p in model.parameters()) else "cpu"
    with torch.no_grad():
        logits: torch.Tensor = model(token_ids.to(device)).logits
    return logits.float().cpu()
