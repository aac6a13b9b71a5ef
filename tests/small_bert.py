"""A BERT small enough for tests of checkpoints, and what they look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers

if TYPE_CHECKING:
    from pathlib import Path


def small_config(*, architectures: list[str] | None = None) -> transformers.BertConfig:
    """Return a BERT of 18.7 kB."""
    return transformers.BertConfig(
        vocab_size=100,
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


def names_in(folder: Path) -> list[str]:
    """Return what a folder holds, hidden or not, but for lock files."""
    return sorted(
        entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock")
    )
