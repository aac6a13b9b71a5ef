"""BERTs small enough for tests, what they are asked, and what their folders hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from pathlib import Path

Classifier: Any = transformers.BertForSequenceClassification
IDS = torch.arange(1, 17)[None]


def small_config(
    *, vocab_size: int = 100, architectures: list[str] | None = None
) -> transformers.BertConfig:
    """Return a BERT of 18.7 kB."""
    return transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        architectures=architectures,
    )


def layered_config() -> transformers.BertConfig:
    """Return a BERT of 16 layers of 2 MiB, and little else."""
    return transformers.BertConfig(
        hidden_size=256,
        num_hidden_layers=16,
        num_attention_heads=4,
        intermediate_size=512,
        vocab_size=500,
        max_position_embeddings=32,
    )


def save_layered(folder: Path) -> None:
    """Write the BERT of 16 layers, always the same, as a checkpoint."""
    torch.manual_seed(0)
    Classifier(layered_config()).save_pretrained(folder)


def logits(model: Any, device: Any = "cuda:0") -> torch.Tensor:
    """Return what a model answers, on the host."""
    with torch.no_grad():
        answer: torch.Tensor = model.eval()(IDS.to(device)).logits
    return answer.cpu()


def names_in(folder: Path) -> list[str]:
    """Return what a folder holds, hidden or not, but for lock files."""
    return sorted(
        entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock")
    )
