"""PyKEEN: sub-batches in training, smaller batches and slices in evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch_max_mem.api
from evidence import CountOoms
from pykeen.evaluation import RankBasedEvaluator
from pykeen.models import DistMult
from pykeen.training import LCWATrainingLoop, training_loop
from pykeen.triples import CoreTriplesFactory

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem import OomInjector

NUM_ENTITIES = 2000


@pytest.fixture
def triples() -> CoreTriplesFactory:
    """A random graph: the scores of a full batch are 16 MB."""
    generator = torch.Generator().manual_seed(0)
    columns = [
        torch.randint(size, (2000,), generator=generator)
        for size in (NUM_ENTITIES, 5, NUM_ENTITIES)
    ]
    return CoreTriplesFactory(
        torch.stack(columns, 1), num_entities=NUM_ENTITIES, num_relations=5
    )


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with fixed numbers: PyKEEN draws weights anew before it trains."""
    values = torch.linspace(-3, 3, tensor.numel(), dtype=tensor.dtype).sin()
    return tensor.copy_(values.view_as(tensor))


def _model(triples: CoreTriplesFactory, device: str) -> DistMult:
    return DistMult(
        triples_factory=triples,
        embedding_dim=16,
        entity_initializer=_spread,
        relation_initializer=_spread,
        loss="BCEWithLogitsLoss",
    ).to(device)


def _train(triples: CoreTriplesFactory, device: str) -> tuple[Any, list[float]]:
    """One full batch, so that the order of the triples does not matter."""
    model = _model(triples, device)
    loop = LCWATrainingLoop(
        model=model,
        triples_factory=triples,
        optimizer="SGD",
        optimizer_kwargs={"lr": 100.0},
    )
    losses = loop.train(
        triples_factory=triples, num_epochs=2, batch_size=2048, use_tqdm=False
    )
    return model, losses


def _evaluate(
    triples: CoreTriplesFactory, device: str, **sizes: int
) -> dict[str, float]:
    results = RankBasedEvaluator().evaluate(
        model=_model(triples, device),
        mapped_triples=triples.mapped_triples,
        additional_filter_triples=[triples.mapped_triples],
        use_tqdm=False,
        **sizes,
    )
    return {name: results.get_metric(name) for name in ("mrr", "amr", "hits@10")}


def _weights(model: DistMult) -> list[torch.Tensor]:
    return [weight.detach().cpu() for weight in model.parameters()]


def test_training_goes_to_sub_batches(
    triples: CoreTriplesFactory, vram_budget: Callable[..., Any]
) -> None:
    """Under a budget the weights are those of the CPU's undivided batch."""
    on_host, expected = _train(triples, "cpu")

    with vram_budget("40MiB"), CountOoms() as ooms:
        on_card, losses = _train(triples, "cuda")

    assert ooms.num
    assert losses == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(_weights(on_card), _weights(on_host), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rule", ["any:min=8MiB", "backward", "any:min=1MiB,nth=3,times=3"]
)
def test_an_oom_in_the_probe_leads_to_sub_batches(
    triples: CoreTriplesFactory, oom_injector: OomInjector, rule: str
) -> None:
    """Forward or backward, once or thrice."""
    _on_host, expected = _train(triples, "cpu")

    armed = oom_injector.arm(rule)
    _on_card, losses = _train(triples, "cuda")

    assert armed.num_failed == (3 if "times" in rule else 1)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_evaluation_halves_its_batch(
    triples: CoreTriplesFactory, vram_budget: Callable[..., Any]
) -> None:
    """Ranks under a budget are the CPU's."""
    expected = _evaluate(triples, "cpu", batch_size=2000)

    with vram_budget("40MiB"), CountOoms() as ooms:
        found = _evaluate(triples, "cuda", batch_size=2000)

    assert ooms.num
    assert found == pytest.approx(expected)


def test_its_detector_is_torch_max_mems() -> None:
    """What that one misses, the driver's and cuBLAS's errors, ends the training."""
    assert training_loop.is_oom_error is torch_max_mem.api.is_oom_error
