"""Which model a checkpoint is of: known names, or any transformers config."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pytest_gpumem.errors import CheckpointError

_BERT: Final = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}

#: Sizes of the published models (config.json of bert-large-uncased and its smaller
#: relatives, gpt2); everything else is the config class's default.
NAMES: Final[dict[str, dict[str, Any]]] = {
    "bert-large": {
        **_BERT,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "vocab_size": 30522,
    },
    "bert-base": {
        **_BERT,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 30522,
    },
    "bert-small": {
        **_BERT,
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 30522,
    },
    "bert-tiny": {
        **_BERT,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "vocab_size": 30522,
    },
    "gpt2-tiny": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 1000,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
_ALIASES: Final = {
    "bert-large-uncased": "bert-large",
    "bert-base-uncased": "bert-base",
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to build.

    Attributes:
        name: For people and folder names.
        config_dict: The config's entries, with ``model_type``.
        architecture: Class name of transformers; None means the auto class for
            sequence classification.
    """

    name: str
    config_dict: dict[str, Any]
    architecture: str | None


def model_spec(
    model: str | os.PathLike[str] | Any, *, architecture: str | None = None
) -> ModelSpec:
    """Return what to build for a name, a path or a config.

    Raises:
        CheckpointError: It is none of them.
    """
    if isinstance(model, str) and _ALIASES.get(model, model) in NAMES:
        name = _ALIASES.get(model, model)
        return _spec(name, dict(NAMES[name]), architecture)
    if isinstance(model, (str, os.PathLike)):
        return _from_file(Path(model), architecture)
    to_dict = getattr(model, "to_dict", None)
    if to_dict is None:
        raise CheckpointError(
            f"model={model!r} is neither a name, a path nor a config of transformers"
        )
    entries = to_dict()
    return _spec(entries.get("model_type") or "model", entries, architecture)


def _from_file(path: Path, architecture: str | None) -> ModelSpec:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"model {str(path)!r} is neither a known name nor a config.json; known are "
            f"{', '.join(NAMES)}"
        )
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(entries, dict) or "model_type" not in entries:
        raise CheckpointError(f"{file} is no config of transformers: no model_type")
    return _spec(file.parent.name or entries["model_type"], entries, architecture)


def _spec(
    name: str, entries: dict[str, Any], architecture: str | None
) -> ModelSpec:
    own = (entries.get("architectures") or [None])[0]
    return ModelSpec(name, entries, architecture or own)
