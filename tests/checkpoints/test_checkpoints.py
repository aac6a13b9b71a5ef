"""Checkpoints: what is built, and that it is whole or not there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_bert import small_config

from pytest_gpumem.checkpoints import (
    NAMES,
    cache,
    make_checkpoint,
)
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from pathlib import Path


Weights = dict[str, torch.Tensor]


def weights_of(folder: Path) -> Weights:
    """Load a checkpoint as its users do."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    state: Weights = model.state_dict()
    return state


def assert_same(left: Weights, right: Weights) -> None:
    """Hold two sets of weights to the same names and bits."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def names_in(folder: Path) -> list[str]:
    """Return what a folder holds, hidden or not, but for lock files."""
    return sorted(
        entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock")
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, for tests that only read."""
    return make_checkpoint(small_config(), cache_dir=tmp_path_factory.mktemp("cache"))


# -- formats ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file_format", "shard", "files"),
    [
        ("safetensors", None, ["model.safetensors"]),
        (
            "safetensors",
            "10KB",
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ],
        ),
        ("bin", None, ["pytorch_model.bin"]),
        (
            "bin",
            "10KB",
            [
                "pytorch_model-00001-of-00002.bin",
                "pytorch_model-00002-of-00002.bin",
                "pytorch_model.bin.index.json",
            ],
        ),
    ],
)
def test_every_format_loads_with_the_same_bits(
    built: Path, tmp_path: Path, file_format: str, shard: str | None, files: list[str]
) -> None:
    """Whole or in shards, safetensors or legacy: the weights are those of the seed."""
    folder = make_checkpoint(
        small_config(), out=tmp_path / "x", format=file_format, max_shard_size=shard
    )

    assert names_in(folder) == sorted(["config.json", cache.MANIFEST, *files])
    assert_same(weights_of(folder), load_file(built / "model.safetensors"))


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_no_shard_is_larger_than_asked_unless_one_tensor_is(
    tmp_path: Path, file_format: str
) -> None:
    """Only headers come on top of the limit."""
    folder = make_checkpoint(
        small_config(), out=tmp_path / "x", format=file_format, max_shard_size=8000
    )
    shards = [file for file in folder.iterdir() if "-of-" in file.name]

    assert len(shards) == 3
    assert max(file.stat().st_size for file in shards) < 8000 + 4096


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
def test_a_decoder_comes_back_with_its_ties_and_its_generation_config(
    tmp_path: Path, name: str, file_format: str
) -> None:
    """GPT-2 ties its head to its embeddings, Llama does not; both can generate."""
    folder = make_checkpoint(name, out=tmp_path / name, format=file_format)

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "gpt2-tiny")
    assert (folder / "generation_config.json").is_file()
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)


def test_both_formats_of_a_tied_model_have_the_same_bits(tmp_path: Path) -> None:
    """A tied weight is written once."""
    states = [
        transformers.AutoModelForCausalLM.from_pretrained(
            make_checkpoint("gpt2-tiny", out=tmp_path / each, format=each)
        ).state_dict()
        for each in ("safetensors", "bin")
    ]

    assert_same(*states)


# -- weights ----------------------------------------------------------------------


def test_bert_large_has_its_published_size() -> None:
    """335,143,938 parameters with two labels, 1.34 GB in float32."""
    config: Any = transformers.AutoConfig.for_model(**NAMES["bert-large"])
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)

    assert sum(p.numel() for p in model.parameters()) == 335_143_938


def test_the_weights_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """One thread draws what several draw."""
    config = small_config(vocab_size=5000)
    before = torch.get_num_threads()
    folders = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            folders.append(make_checkpoint(config, out=tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)

    assert_same(*(load_file(folder / "model.safetensors") for folder in folders))


def test_another_seed_gives_other_weights(built: Path, tmp_path: Path) -> None:
    """The seed is part of the request, and of the weights."""
    other = make_checkpoint(small_config(), seed=1, cache_dir=tmp_path)
    name = "bert.encoder.layer.0.output.dense.weight"

    left, right = (weights_of(folder)[name] for folder in (built, other))

    assert not torch.equal(left, right)


def test_what_is_global_neither_matters_nor_changes(
    built: Path, tmp_path: Path
) -> None:
    """Random state, default dtype and default device are the caller's."""
    torch.manual_seed(123)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            folder = make_checkpoint(small_config(), out=tmp_path / "x")
            assert torch.empty(0).device.type == "meta"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(torch.get_rng_state(), state)
    assert_same(weights_of(folder), weights_of(built))


def test_the_simulated_device_neither_matters_nor_notices(
    built: Path, tmp_path: Path
) -> None:
    """Even where new tensors go to the card by default."""
    with simulated_device("T4") as machine, torch.device("cuda"):
        torch.cuda.manual_seed_all(7)
        state = torch.cuda.get_rng_state()
        folder = make_checkpoint(small_config(), out=tmp_path / "x")

        assert torch.equal(torch.cuda.get_rng_state(), state)
        assert machine.num_requests == 0

    assert_same(weights_of(folder), weights_of(built))


def test_the_weights_are_those_of_a_fresh_model(tmp_path: Path) -> None:
    """Normal weights of the config's spread, zero biases, LayerNorms of one."""
    folder = make_checkpoint("bert-tiny", cache_dir=tmp_path)
    state = weights_of(folder)
    weight = state["bert.encoder.layer.1.output.dense.weight"]

    assert weight.mean().abs() < 0.001
    assert weight.std() == pytest.approx(0.02, rel=0.02)
    assert not state["bert.encoder.layer.1.output.dense.bias"].any()
    assert (state["bert.encoder.layer.1.output.LayerNorm.weight"] == 1).all()


def test_the_output_depends_on_the_input(tmp_path: Path) -> None:
    """So that comparing outputs means something."""
    folder = make_checkpoint("bert-tiny", cache_dir=tmp_path)
    model: Any = transformers.BertForSequenceClassification.from_pretrained(folder)
    tokens = torch.arange(64).reshape(2, 32) * 400

    with torch.no_grad():
        first, second = model.eval()(tokens).logits

    assert first.shape == (2,)
    assert (first - second).abs().min() > 0.005


@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_another_dtype_is_the_float32_rounded(
    built: Path, tmp_path: Path, file_format: str, dtype: str
) -> None:
    """The config says so too, and a loader that asks for nothing gets it."""
    folder = make_checkpoint(
        small_config(), out=tmp_path / "x", dtype=dtype, format=file_format
    )
    wanted = {
        name: tensor.to(getattr(torch, dtype))
        for name, tensor in weights_of(built).items()
    }

    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    assert_same(weights_of(folder), wanted)
