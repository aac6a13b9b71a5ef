"""The ladder as functions that can be named on a command line.

``pytest-gpumem check ladder:load --run ladder:infer`` runs all checks on both.
"""

from __future__ import annotations

from typing import Any

import torch
from loader import classify, load_model

from pytest_gpumem import make_checkpoint

TOKENS = torch.arange(1000, 1008)[None]


def load() -> Any:
    """Load bert-large on the highest rung that fits."""
    loaded = load_model(make_checkpoint("bert-large"), make_checkpoint("bert-small"))
    return loaded.model


def infer(model: Any) -> torch.Tensor:
    """Return the logits of a sentence, on the CPU in fp32."""
    return classify(model, TOKENS)
