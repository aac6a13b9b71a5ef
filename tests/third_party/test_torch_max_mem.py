"""torch-max-mem: ``maximize_memory_utilization`` halves a parameter until it fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from evidence import MIB, CountOoms, accepted_by
from torch_max_mem import MemoryUtilizationMaximizer, maximize_memory_utilization
from torch_max_mem.api import is_oom_error, maximize_memory_utilization_decorator

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem import OomInjector


def _knn(points: torch.Tensor, others: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return the three nearest of the others for each point, in batches."""
    return torch.cat(
        [
            torch.topk(torch.cdist(part, others), k=3, largest=False).indices.cpu()
            for part in points.split(batch_size)
        ]
    )


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor]:
    """Points on the host whose distances need 32 MiB at once."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(8192, 64, generator=generator),
        torch.randn(1024, 64, generator=generator),
    )


def test_a_batch_that_is_too_large_is_halved(
    points: tuple[torch.Tensor, torch.Tensor], vram_budget: Callable[..., Any]
) -> None:
    """Under a budget the neighbours are those of the CPU, in smaller batches."""
    expected = _knn(*points, batch_size=len(points[0]))
    maximizer = MemoryUtilizationMaximizer()
    on_card = [each.cuda() for each in points]

    with vram_budget("44MiB"), CountOoms() as ooms:
        found, (batch_size,) = _tuned(on_card)
        again = maximizer(_knn)(*on_card, batch_size=len(points[0]))

    assert ooms.num
    assert 32 <= batch_size < len(points[0])
    assert torch.equal(expected, found)
    assert torch.equal(expected, again)


def _tuned(on_card: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Run it in the form that tells the size."""
    tuned = maximize_memory_utilization_decorator()(_knn)
    result: tuple[torch.Tensor, tuple[int, ...]] = tuned(
        *on_card, batch_size=len(on_card[0])
    )
    return result


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_injected_oom_is_survived(
    points: tuple[torch.Tensor, torch.Tensor], oom_injector: OomInjector, nth: int
) -> None:
    """Whichever allocation of the first attempt fails."""
    expected = _knn(*points, batch_size=len(points[0]))
    on_card = [each.cuda() for each in points]

    rule = oom_injector.arm(f"any:nth={nth}")
    found, (batch_size,) = _tuned(on_card)

    assert rule.num_failed == 1
    assert batch_size == len(points[0]) // 2
    assert torch.equal(expected, found)


def test_the_failed_attempt_stays_on_the_card_during_the_retry(
    vram_budget: Callable[..., Any],
) -> None:
    """A finding: the error is kept for its traceback, and that keeps the tensors.

    Thirty fit when they are tried first. As the retry of sixty they do not, nor do
    fifteen: the weights of the attempt before are still on the card, held by the frame
    in ``last_error``'s traceback, and so it goes down to one.
    """
    tried: list[tuple[int, int]] = []

    def run(batch_size: int) -> float:
        tried.append((batch_size, torch.cuda.memory_allocated() // MIB))
        weights = torch.ones(28 * MIB // 4, device="cuda")
        part = torch.ones(batch_size * MIB // 4, device="cuda")
        return float(weights[0] + part[0])

    with vram_budget("64MiB"), CountOoms() as ooms:
        assert maximize_memory_utilization(q=1)(run)(batch_size=30) == 2.0
        assert maximize_memory_utilization(q=1)(run)(batch_size=60) == 2.0

    assert tried == [(30, 0), (60, 0), (30, 28), (15, 28), (7, 28), (3, 28), (1, 28)]
    assert ooms.num == 5


def test_its_detector() -> None:
    """Everything of the allocator's; neither the driver nor cuBLAS.

    The host's text is known only as "not enough memory", which Windows says.
    """
    assert accepted_by(is_oom_error) == {
        "native",
        "legacy",
        "async",
        "cudnn-unsupported",
        "nvml",
        "hip",
        "xpu",
        "mps",
    }
