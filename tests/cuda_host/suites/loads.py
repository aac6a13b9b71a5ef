"""Loading models: under a budget, where they are to fit, and with loads that fail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModel, BertConfig

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = BertConfig(
    architectures=["BertModel"],
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=4,
    vocab_size=4096,
)


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Any) -> Path:
    made: Path = make_checkpoint(CONFIG)
    return made


def _places(model: Any) -> set[str]:
    return {each.device.type for each in model.parameters()}


def test_all_of_it(checkpoint: Path) -> None:
    model = AutoModel.from_pretrained(checkpoint, device_map="cuda:0")
    assert {"cuda"} == _places(model)


def test_in_half(checkpoint: Path) -> None:
    AutoModel.from_pretrained(checkpoint, device_map="cuda:0", dtype=torch.float16)


def test_moved(checkpoint: Path) -> None:
    AutoModel.from_pretrained(checkpoint).to("cuda")


@pytest.mark.gpu_budget("24MiB")
def test_what_fits(checkpoint: Path) -> None:
    model = AutoModel.from_pretrained(checkpoint, device_map="auto")
    assert {"0", "1"} == {str(each) for each in model.hf_device_map.values()}


@pytest.mark.gpu_budget("8MiB")
def test_what_does_not_fit(checkpoint: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"8\.00 MiB allowed"):
        AutoModel.from_pretrained(checkpoint, device_map="cuda:0")


def _load(checkpoint: Path) -> Any:
    try:
        return AutoModel.from_pretrained(checkpoint, device_map="cuda:0")
    except torch.OutOfMemoryError:
        pass
    return AutoModel.from_pretrained(checkpoint)


@pytest.mark.inject_oom("load:nth=1")
def test_a_load_that_fails(checkpoint: Path) -> None:
    assert {"cpu"} == _places(_load(checkpoint))


@pytest.mark.oom_sweep(points="sites", modes=["transient"])
def test_a_load_that_is_swept(checkpoint: Path) -> None:
    _load(checkpoint)


def test_a_ladder(fallback: Any, checkpoint: Path) -> None:
    fallback(lambda: _load(checkpoint), budgets=["64MiB", "16MiB", "4MiB"])
