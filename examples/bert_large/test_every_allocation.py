"""Fail each allocation of the loader in turn: the ladder must hold at every one.

As it stands one allocation of each source line is failed, which takes a minute.
``pytest --gpu-oom-sweep=all examples/bert_large`` fails all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from loader import classify, load_model
from transformers import AutoModelForSequenceClassification

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS = torch.arange(1000, 1008)[None]


@pytest.fixture(scope="module")
def bert_small(make_checkpoint: Callable[..., Path]) -> Path:
    """The checkpoint of the ladder's smaller model."""
    return make_checkpoint("bert-small")


@pytest.fixture(scope="module")
def references(bert_large: Path, bert_small: Path) -> dict[bool, torch.Tensor]:
    """What both checkpoints compute on the CPU in fp32, by "is it the smaller one"."""
    answers = {}
    for path in (bert_large, bert_small):
        model: Any = AutoModelForSequenceClassification.from_pretrained(path).eval()
        answers[path == bert_small] = classify(model, TOKENS)
    return answers


@pytest.mark.oom_sweep(points="sites", rule="load", recover=True)
def test_the_ladder_holds_at_every_allocation(
    bert_large: Path, bert_small: Path, references: dict[bool, torch.Tensor]
) -> None:
    """Whichever allocation of the load fails, a rung below it answers rightly."""
    loaded = load_model(bert_large, bert_small)

    wanted = references[loaded.rung == "smaller"]
    assert torch.allclose(wanted, classify(loaded.model, TOKENS), atol=0.02)
