"""Which model a checkpoint is of: names, configs, files, classes."""

from __future__ import annotations

import json
import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from small_bert import names_in, small_config

from pytest_gpumem.checkpoints import NAMES, make_checkpoint
from pytest_gpumem.checkpoints.models import model_spec
from pytest_gpumem.errors import CheckpointError, SizeError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("alias", "name"),
    [("bert-large-uncased", "bert-large"), ("bert-base-uncased", "bert-base")],
)
def test_a_published_name_means_the_size(alias: str, name: str) -> None:
    """The names of the hub are accepted for the sizes that they stand for."""
    assert model_spec(alias) == model_spec(name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bert-large", 335_143_938),
        ("bert-base", 109_483_778),
        ("distilbert-base", 66_955_010),
        ("roberta-base", 124_647_170),
        ("gpt2", 124_439_808),
    ],
)
def test_a_known_model_has_the_size_of_the_published_one(
    name: str, parameters: int
) -> None:
    """To the parameter, with a head for two labels where it classifies."""
    spec = model_spec(name)
    entries = dict(spec.config_dict)
    config = transformers.AutoConfig.for_model(entries.pop("model_type"), **entries)
    kind: Any = getattr(transformers, str(spec.architecture))
    with torch.device("meta"):
        model = kind(config)

    assert parameters == sum(each.numel() for each in model.parameters())


def test_a_config_without_a_class_becomes_a_sequence_classifier(
    tmp_path: Path,
) -> None:
    """That is the first of the auto classes that are tried."""
    built = make_checkpoint(small_config(), cache_dir=tmp_path)

    config = json.loads((built / "config.json").read_text())

    assert config["architectures"] == ["BertForSequenceClassification"]
    assert built.name.startswith("bert-")


def test_a_config_without_such_a_classifier_becomes_the_plain_model(
    tmp_path: Path,
) -> None:
    """Vision models have no sequences to classify."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
    )

    folder = make_checkpoint(config, cache_dir=tmp_path)

    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["ViTModel"]


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "AutoModelForMaskedLM"])
def test_a_class_may_be_named(tmp_path: Path, architecture: str) -> None:
    """Either the class itself, or an auto class that finds it."""
    folder = make_checkpoint(
        small_config(), cache_dir=tmp_path, architecture=architecture
    )

    written = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == ["BertForMaskedLM"]


def test_a_config_file_is_as_good_as_its_config(tmp_path: Path) -> None:
    """The file and its folder are the same model; the folder's name is its name."""
    folder = tmp_path / "my model"
    small_config(architectures=["BertForSequenceClassification"]).save_pretrained(
        folder
    )

    by_file = make_checkpoint(folder / "config.json", cache_dir=tmp_path / "cache")
    by_folder = make_checkpoint(str(folder), cache_dir=tmp_path / "cache")

    assert by_file == by_folder
    assert by_file.name.startswith("my-model-")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "onnx"},
            "format='onnx' is not known; accepted are safetensors, bin",
        ),
        (
            {"dtype": "int8"},
            (
                "dtype='int8' is not known; accepted are float32, float16, bfloat16, "
                "float64"
            ),
        ),
        ({"verify": "no"}, "verify='no' is not known; accepted are quick, full"),
        (
            {"seed": -1},
            "seed=-1 is not a seed; give a whole number from 0 to 2**63 - 1",
        ),
        (
            {"architecture": "BertForNothing"},
            (
                "architecture 'BertForNothing' is not a class of transformers "
                f"{transformers.__version__}; give for example BertForMaskedLM"
            ),
        ),
        (
            {"architecture": "GPT2LMHeadModel"},
            "architecture 'GPT2LMHeadModel' does not take a BertConfig",
        ),
        (
            {"architecture": "AutoModelForImageClassification"},
            (
                "no class of AutoModelForImageClassification takes a BertConfig; name "
                "one with architecture=..."
            ),
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_makes_no_sense_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """The message says what is accepted, and nothing is left behind."""
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        make_checkpoint(small_config(), cache_dir=tmp_path, **options)

    assert names_in(tmp_path) == []


def test_a_shard_size_is_a_size(tmp_path: Path) -> None:
    """It is read like every other size."""
    with pytest.raises(SizeError, match="write GiB"):
        make_checkpoint("bert-tiny", cache_dir=tmp_path, max_shard_size="4G")


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    """A name that is no file either."""
    message = (
        "model 'bert-huge' is neither a known name nor a config.json; known are "
        f"{', '.join(NAMES)}"
    )

    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        make_checkpoint("bert-huge", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is not a config of transformers"),
        ("{}", "has no model_type"),
        ('{"model_type": "perceptron"}', "is not valid: .*perceptron"),
    ],
)
def test_a_file_that_is_no_config_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    """The message names the file or its folder, and the reason."""
    file = tmp_path / "config.json"
    file.write_text(text)

    with pytest.raises(CheckpointError, match=message):
        make_checkpoint(file, cache_dir=tmp_path / "cache")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra that brings it is named too."""

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)

    with pytest.raises(
        CheckpointError,
        match=r"^building a checkpoint needs torch; install pytest-gpumem\[hf\]$",
    ):
        make_checkpoint("bert-tiny")
