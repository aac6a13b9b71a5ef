"""FlagEmbedding: encoders try a first batch at three quarters of the size until it fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from evidence import CountOoms
from FlagEmbedding import FlagModel
from transformers import BertConfig, BertModel, BertTokenizer

from pytest_gpumem import OomInjector
from pytest_gpumem.rules.rule import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

pytest_plugins = ["pytester"]

SENTENCES = [
    " ".join(f"w{(row * column) % 100}" for column in range(20))
    for row in range(1, 513)
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A BERT of two small layers with random weights, and its words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{index}" for index in range(100)]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(tmp_path)
    return tmp_path


class Encoder:
    """A FlagModel that notes the sizes of its batches.

    Args:
        checkpoint: The model's folder.
        device: Where it runs.
    """

    def __init__(self, checkpoint: Path, device: str) -> None:
        self.model = FlagModel(str(checkpoint), devices=device, use_fp16=False)
        self.sizes: list[int] = []
        self.model.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _module: object, _inputs: object, named: dict[str, Any]) -> None:
        self.sizes.append(len(named["input_ids"]))

    def encode(self, batch_size: int) -> np.ndarray:
        """Encode all sentences."""
        vectors: np.ndarray = self.model.encode(SENTENCES, batch_size=batch_size)
        return vectors


def test_a_batch_that_is_too_large_is_reduced(
    checkpoint: Path, vram_budget: Callable[..., Any]
) -> None:
    """Under a budget the embeddings are the CPU's."""
    expected = Encoder(checkpoint, "cpu").encode(batch_size=512)
    encoder = Encoder(checkpoint, "cuda:0")

    with vram_budget("32MiB"), CountOoms() as ooms:
        vectors = encoder.encode(batch_size=512)

    assert ooms.num == 3
    assert encoder.sizes == [512, 384, 288, 216, 216, 216, 80]
    assert abs(vectors - expected).max() < 1e-6


def test_an_injected_oom_in_the_trial_is_survived(
    checkpoint: Path, oom_injector: OomInjector
) -> None:
    """The first batch is a trial; it is computed again afterwards."""
    expected = Encoder(checkpoint, "cpu").encode(batch_size=256)
    encoder = Encoder(checkpoint, "cuda:0")

    rule = oom_injector.arm("forward:nth=2")
    vectors = encoder.encode(batch_size=256)

    assert rule.num_failed == 1
    assert encoder.sizes == [256, 192, 192, 192, 128]
    assert abs(vectors - expected).max() < 1e-6


def test_an_oom_after_the_trial_is_not_survived(
    checkpoint: Path, oom_injector: OomInjector
) -> None:
    """A finding: only the first batch is tried; later ones have no fallback.

    The longest sentences are in it, but another user of the card may take memory.
    """
    encoder = Encoder(checkpoint, "cuda:0")
    encoder.encode(batch_size=256)
    num_batches = len(encoder.sizes)
    rule = oom_injector.arm("forward:nth=60")

    with pytest.raises(torch.OutOfMemoryError):
        encoder.encode(batch_size=256)

    assert rule.num_failed == 1
    assert len(encoder.sizes) > num_batches + 1


def test_it_asks_nothing_of_an_error(checkpoint: Path) -> None:
    """Every RuntimeError in the trial makes the batch smaller, no OOM's too."""
    encoder = Encoder(checkpoint, "cuda:0")
    for flavour in set(FLAVOURS) - {"cupy"}:  # a MemoryError
        encoder.sizes.clear()
        with OomInjector(f"forward:flavour={flavour}") as injector:
            encoder.encode(batch_size=512)
        assert injector.num_injected == 1
        assert encoder.sizes == [512, 384, 384, 128]


@pytest.mark.parametrize("flavour", ["native", "not-oom"])
def test_every_runtime_error_shrinks_the_batch_to_nothing(
    checkpoint: Path, oom_injector: OomInjector, flavour: str
) -> None:
    """A finding: an error that stays, OOM or not, is lost.

    Each RuntimeError is swallowed, a device-side assertion too, and at a size of zero
    the tokenizer's complaint about an empty batch is all that the caller sees.
    """
    encoder = Encoder(checkpoint, "cuda:0")
    rule = oom_injector.arm(f"forward:persistent,flavour={flavour}")

    with pytest.raises(AttributeError, match="'list' object has no attribute 'keys'"):
        encoder.encode(batch_size=64)

    assert encoder.sizes == [64, 48, 36, 27, 20, 15, 11, 8, 6, 4, 3, 2, 1]
    assert rule.num_failed == len(encoder.sizes)


SEARCH = """
from test_flag_embedding import Encoder, checkpoint


def test_it(checkpoint):
    Encoder(checkpoint, "cuda:0").encode(batch_size=512)
"""


def test_the_batch_that_it_falls_back_to_is_shown(pytester: pytest.Pytester) -> None:
    """From the first to the last, though nothing says so."""
    pytester.makepyfile(SEARCH)
    pytester.syspathinsert(Path(__file__).parent)

    result = pytester.runpytest("--gpu-card=T4", "--gpu-budget=32MiB")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["*: the batch of encode_single_device was shrunk from 512 to 216, as *"]
    )
