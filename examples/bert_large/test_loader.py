"""Prove the loader's ladder: every rung is reached, right, and leaves nothing behind.

Run it with ``pytest --gpu-budget=4GiB examples/bert_large``; no GPU is needed.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loader import classify, load_model
from transformers import AutoModelForSequenceClassification

from pytest_gpumem import judge_load

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS = torch.arange(1000, 1000 + 2 * 128).reshape(2, 128)


@pytest.fixture(scope="module")
def bert_small(make_checkpoint: Callable[..., Path]) -> Path:
    """The checkpoint of the ladder's smaller model."""
    return make_checkpoint("bert-small")


@cache
def reference(path: Path) -> torch.Tensor:
    """Return what the checkpoint computes on the CPU in fp32."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    return classify(model, TOKENS)


@pytest.mark.parametrize(
    ("budget", "rung", "devices", "dtype"),
    [
        ("4GiB", "cuda fp32", ["cuda:0"], torch.float32),
        ("1GiB", "cuda fp16", ["cuda:0"], torch.float16),
        ("400MiB", "offload", ["cuda:0", "meta"], torch.float16),
        ("150MiB", "smaller", ["cuda:0"], torch.float16),
        ("32MiB", "cpu", ["cpu"], torch.float32),
    ],
)
def test_each_budget_ends_on_its_rung(
    bert_large: Path,
    bert_small: Path,
    vram_budget: Callable[..., Any],
    budget: str,
    rung: str,
    devices: list[str],
    dtype: torch.dtype,
) -> None:
    """Under each budget the model is where it should be and computes the same."""
    path = bert_small if rung == "smaller" else bert_large
    rungs = []

    def load() -> Any:
        loaded = load_model(bert_large, bert_small)
        rungs.append(loaded.rung)
        return loaded.model

    with vram_budget(budget):
        verdict = judge_load(
            load,
            run=lambda model: classify(model, TOKENS),
            reference=reference(path),
            expect_devices=devices,
            expect_dtype=dtype,
        )

    verdict.check()
    assert [rung] == rungs


@pytest.mark.parametrize(
    ("rule", "rung"),
    [
        ("load:nth=1", "cuda fp16"),
        ("load:nth=50", "cuda fp16"),
        ("load:nth=1,times=2", "offload"),
        ("load:nth=1,times=3", "smaller"),
        ("load:nth=1,persistent", "cpu"),
    ],
)
def test_an_oom_at_any_rung_falls_to_the_next(
    bert_large: Path, bert_small: Path, rule: str, rung: str
) -> None:
    """An OOM in a load leads one rung down, without a trace on the card."""
    rungs = []

    def load() -> Any:
        loaded = load_model(bert_large, bert_small)
        rungs.append(loaded.rung)
        return loaded.model

    verdict = judge_load(load, rules=[rule])

    verdict.check()
    assert verdict.num_injected
    assert [rung] == rungs


@pytest.mark.gpu_budget("1GiB")
@pytest.mark.max_vram("700MiB")
def test_fp16_needs_less_than_700_mib(bert_large: Path, bert_small: Path) -> None:
    """On a 1 GiB share the model is in half precision, and so is its peak."""
    loaded = load_model(bert_large, bert_small)

    classify(loaded.model, TOKENS)

    assert loaded.rung == "cuda fp16"


def test_a_missing_checkpoint_is_no_reason_to_fall_back(
    tmp_path: Path, bert_small: Path
) -> None:
    """An error that is not an OOM reaches the caller."""
    with pytest.raises(ValueError, match="Unrecognized model"):
        load_model(tmp_path, bert_small)
