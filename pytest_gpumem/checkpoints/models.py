"""The models of checkpoints: known names, or any transformers config."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

_BERT: Final = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
}

#: The known models. BERT models have the sizes of the published models; the tiny decoders
#: have made-up sizes. All other entries are the defaults of the config's class.
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
    # Source of these three: the published config.json of each.
    "distilbert-base": {
        "model_type": "distilbert",
        "architectures": ["DistilBertForSequenceClassification"],
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "vocab_size": 30522,
    },
    "roberta-base": {
        "model_type": "roberta",
        "architectures": ["RobertaForSequenceClassification"],
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 50265,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "vocab_size": 50257,
        "n_positions": 1024,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
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
    "llama-tiny": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 1000,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    # Source: the published config.json of Meta-Llama-3-70B.
    "llama-70b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}
#: Names on the hub of models that have another name above.
ALIASES: Final = {
    "bert-large-uncased": "bert-large",
    "bert-base-uncased": "bert-base",
    "distilbert-base-uncased": "distilbert-base",
}


#: Entries of a config that do not describe the model.
_IDLE: Final = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model to build.

    Attributes:
        name: The name for people and folders.
        config_dict: The config's entries, with ``model_type``.
        architecture: Class name of transformers; None means an auto class.
    """

    name: str
    config_dict: dict[str, Any]
    architecture: str | None


def model_spec(
    model: str | os.PathLike[str] | PretrainedConfig,
    *,
    architecture: str | None = None,
) -> ModelSpec:
    """Return the model to build for a name, a path or a config.

    Raises:
        CheckpointError: It is none of them.
    """
    if isinstance(model, (str, os.PathLike)):
        name = ALIASES.get(str(model), str(model))
        if name in NAMES:
            return _spec(name, NAMES[name], architecture)
        return _from_file(Path(model), architecture)
    to_dict = getattr(model, "to_dict", None)
    if to_dict is None:
        raise CheckpointError(
            f"model={model!r} is neither a name, a path nor a config of transformers"
        )
    entries = to_dict()
    return _spec(str(entries.get("model_type")), entries, architecture)


def _from_file(path: Path, architecture: str | None) -> ModelSpec:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"model {str(path)!r} is neither a known name nor a config.json; known are "
            f"{', '.join(NAMES)}"
        )
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file} is not a config of transformers")
    return _spec(file.resolve().parent.name, entries, architecture)


def _spec(name: str, entries: Mapping[str, Any], architecture: str | None) -> ModelSpec:
    model_type = entries.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"the config of {name} has no model_type, which names the kind of model; "
            'add for example "model_type": "bert"'
        )
    listed = entries.get("architectures")
    own = listed[0] if isinstance(listed, list) and listed else None
    if own is not None and not isinstance(own, str):
        raise CheckpointError(f"the config of {name} has no class in its architectures")
    config_dict = {key: entries[key] for key in entries if key not in _IDLE}
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or model_type
    return ModelSpec(plain, config_dict, architecture or own)


def library_versions() -> dict[str, str]:
    """Return the minor versions of the libraries that draw and write the weights.

    Raises:
        CheckpointError: One of them is not installed.
    """
    versions = {}
    for name in ("torch", "transformers"):
        try:
            release = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise CheckpointError(
                f"building a checkpoint needs {name}; install pytest-gpumem[hf]"
            ) from None
        versions[name] = ".".join(release.split(".")[:2])
    return versions
