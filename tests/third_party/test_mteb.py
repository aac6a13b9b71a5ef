"""MTEB: similarities are computed on the card, and on the CPU where it has no room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from evidence import CountOoms
from mteb.similarity_functions import cos_sim, dot_score

from pytest_gpumem import OomInjector
from pytest_gpumem.rules.rule import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings on the host whose similarities are 64 MiB."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(4096, 64, generator=generator),
        torch.randn(4096, 64, generator=generator),
    )


@pytest.mark.parametrize(("budget", "falls_back"), [("200MiB", False), ("64MiB", True)])
def test_it_falls_back_to_the_cpu(
    embeddings: tuple[torch.Tensor, torch.Tensor],
    vram_budget: Callable[..., Any],
    budget: str,
    *,
    falls_back: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a line in the log, and the same scores."""
    queries, documents = embeddings
    with vram_budget(budget), CountOoms() as ooms:
        scores = cos_sim(queries, documents)

    assert bool(ooms.num) == falls_back
    assert ("falling back to CPU" in caplog.text) == falls_back
    assert scores.device.type == "cpu"
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(scores, normal(queries) @ normal(documents).T)


def test_scores_of_a_card_go_back_to_it(
    embeddings: tuple[torch.Tensor, torch.Tensor], oom_injector: OomInjector
) -> None:
    """Queries on the card and documents on the host: the scores are with the queries."""
    queries, documents = embeddings
    on_card = queries.cuda()

    rule = oom_injector.arm("any:nth=2")
    scores = dot_score(on_card, documents)

    assert rule.num_failed == 1
    assert scores.device.type == "cuda"
    torch.testing.assert_close(scores.cpu(), queries @ documents.T)


def test_its_detector(embeddings: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Whatever says "out of memory"; not cuBLAS, cuDNN, CuPy, NVML, the host."""
    survived = set()
    for flavour in FLAVOURS:
        with OomInjector(f"any:flavour={flavour}") as injector:
            try:
                cos_sim(*embeddings)
            except (RuntimeError, MemoryError):
                pass
            else:
                survived.add(flavour)
        assert injector.num_injected == 1

    allocators = {"native", "legacy", "async", "hip", "xpu", "mps"}
    assert survived == allocators | {"driver", "address-space", "nccl", "triton"}


def test_embeddings_that_are_on_the_card_have_no_fallback(
    embeddings: tuple[torch.Tensor, torch.Tensor], vram_budget: Callable[..., Any]
) -> None:
    """A limit: with both sides on the card, the OOM reaches the caller."""
    queries, documents = (each.cuda() for each in embeddings)

    with (
        vram_budget("64MiB"),
        CountOoms() as ooms,
        pytest.raises(torch.OutOfMemoryError),
    ):
        dot_score(queries, documents)

    assert ooms.num == 1
