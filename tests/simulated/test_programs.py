"""What serving and training programs do to a card, under a budget, until it is too small."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from pytest_gpumem import vram_budget
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.machine import card_of

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
WIDTH = 256
#: Bytes that one block of cached keys and values takes.
BLOCK_BYTES = 2 * MIB
#: Between what a rank's step takes of shards, and of the whole model.
BUDGET = 180 * MIB


class _Server:
    """A server that measures first and gives what is left to its cache.

    Args:
        share: The share of the card's free bytes that it may use.
        sizes: The batch sizes that it captures a graph for.
    """

    def __init__(self, share: float, sizes: tuple[int, ...]) -> None:
        free, _total = torch.cuda.mem_get_info()
        self.model = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        ).cuda()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            self.model(torch.zeros(max(sizes) * 64, WIDTH, device="cuda"))
        peak = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        count = int((free * share - peak) // BLOCK_BYTES)
        self.cache = [
            torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda")
            for _ in range(count)
        ]
        self.source = torch.zeros(max(sizes), WIDTH, device="cuda")
        pool = torch.cuda.graph_pool_handle()
        self.graphs = {}
        for size in sorted(sizes, reverse=True):
            graph = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(graph, pool=pool):
                result = self.model(self.source[:size])
            self.graphs[size] = (graph, result)

    def serve(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the model's answers, by the smallest graph that is large enough."""
        size = min(each for each in self.graphs if each >= len(batch))
        graph, result = self.graphs[size]
        self.source[: len(batch)].copy_(batch)
        graph.replay()
        answer: torch.Tensor = result[: len(batch)].clone()
        return answer


def test_a_server_measures_fills_and_captures() -> None:
    """Its cache takes what a budget leaves; graphs answer as the model does."""
    with simulated_device("T4"), vram_budget(256 * MIB):
        server = _Server(0.8, (1, 4, 8))
        reserved = torch.cuda.memory_reserved()
        pools = {each["segment_pool_id"] for each in torch.cuda.memory_snapshot()}
        for length in (1, 3, 8):
            batch = torch.randn(length, WIDTH, device="cuda")
            with torch.no_grad():
                expected, found = server.model(batch), server.serve(batch)
            assert torch.allclose(expected, found, atol=1e-5)

        assert 50 < len(server.cache) < 100
        assert 2 == len(pools)  # the default one, and all graphs'
        assert reserved <= 256 * MIB


def test_a_server_that_leaves_nothing_for_graphs_meets_an_oom() -> None:
    """The cache has taken it all: the capture's own error names the budget."""
    with (
        simulated_device("T4"),
        vram_budget(256 * MIB),
        pytest.raises(torch.OutOfMemoryError, match=r"256\.00 MiB allowed"),
    ):
        _Server(1.0, (1, 4096))


@pytest.mark.slow  # TorchDynamo's imports
def test_a_compiled_trainer_trains_until_its_batch_is_too_large(tmp_path: Path) -> None:
    """``torch_compile=True`` as users have it: eager bytes, one warning, one OOM."""
    import transformers

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(WIDTH, 16 * WIDTH), nn.ReLU(), nn.Linear(16 * WIDTH, 1)
            )

        def forward(self, source: torch.Tensor, labels: torch.Tensor) -> Any:
            result = self.layers(source)
            return {"loss": (result - labels).square().mean(), "logits": result}

    rows = [
        {"source": torch.full((WIDTH,), each / 10), "labels": torch.ones(1)}
        for each in range(8)
    ] * 512

    def train(size: int) -> list[Any]:
        options = transformers.TrainingArguments(
            str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            max_steps=2,
            torch_compile=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(Model(), options, train_dataset=rows)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.train()
        return [each.category.__name__ for each in told]

    with simulated_device("T4"), vram_budget(120 * MIB):
        assert 1 == train(8).count("RunsEagerlyWarning")
        with pytest.raises(torch.OutOfMemoryError, match=r"120\.00 MiB allowed"):
            train(4096)


@pytest.mark.slow  # two models of 48 MiB with their optimisers, on the host
@pytest.mark.filterwarnings("ignore")
def test_shards_fit_where_the_model_does_not() -> None:
    """``fully_shard`` over two ranks trains a step within half the bytes of one card."""

    def step(*, is_sharded: bool) -> None:
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _layer in range(12)))
        model.cuda()
        if is_sharded:
            for layer in model:
                fully_shard(layer)
            fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(4, 1024, device="cuda")).sum().backward()
        optimizer.step()

    def body(rank: int) -> bool:
        card_of(rank).set_budget(BUDGET)  # of one card: each rank has a thread
        step(is_sharded=True)
        torch.cuda.empty_cache()
        with pytest.raises(torch.OutOfMemoryError, match=f"GPU {rank} has"):
            step(is_sharded=False)
        return True

    assert [True, True] == run_ranks(body)
