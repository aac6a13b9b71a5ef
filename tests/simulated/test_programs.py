"""What serving and training programs do to a card, under a budget, until it is too small."""

from __future__ import annotations

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

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


def _checkpointed_and_offloaded(model: Any, source: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return _output(checkpoint(model, source, use_reentrant=False))


def _saved_elsewhere(model: Any, source: torch.Tensor) -> torch.Tensor:
    device = source.device
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.cpu(), lambda tensor: tensor.to(device)
    ):
        return _output(model(source))


def _selective(model: Any, source: torch.Tensor) -> torch.Tensor:
    def choose(_context: Any, func: Any, *_args: Any, **_options: Any) -> Any:
        keeps = func is torch.ops.aten.addmm.default
        return (
            CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
        )

    contexts = partial(create_selective_checkpoint_contexts, choose)
    return _output(checkpoint(model, source, use_reentrant=False, context_fn=contexts))


def _wrapped(model: Any, source: torch.Tensor) -> torch.Tensor:
    return _output(offload_wrapper(checkpoint_wrapper(model))(source))


def _output(value: Any) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


@pytest.mark.parametrize(
    "way", [_checkpointed_and_offloaded, _saved_elsewhere, _selective, _wrapped]
)
def test_what_is_saved_may_be_dropped_or_go_to_the_host(way: Any) -> None:
    """Checkpoints, hooks of saved tensors, and both: the CPU's gradients."""

    def gradients(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU())] * 3
        model = torch.nn.Sequential(*layers)
        source = torch.rand(8, 32).to(device).requires_grad_()
        way(model.to(device), source).square().sum().backward()
        found = [each.grad for each in (source, *model.parameters())]
        return [each for each in found if each is not None]

    expected = gradients("cpu")
    with simulated_device("T4"):
        found = gradients("cuda")

        assert len(found) == len(expected) == 3
        assert all(each.is_cuda for each in found)
        assert all(map(torch.equal, (each.cpu() for each in found), expected))


def test_threads_allocate_from_pools_of_their_own() -> None:
    """Four threads at once: each one's blocks are in its pool, and go with it."""
    with simulated_device("T4"):
        pools = [torch.cuda.MemPool() for _each in range(4)]
        kept: list[torch.Tensor] = []
        begin = threading.Barrier(len(pools))

        def fill(pool: Any) -> None:
            begin.wait(20)
            with torch.cuda.use_mem_pool(pool):
                kept.extend(torch.ones(2**18, device="cuda") for _each in range(20))
            kept.append(torch.ones(2**18, device="cuda"))

        with ThreadPoolExecutor(len(pools)) as executor:
            list(executor.map(fill, pools))
        held = [
            sum(segment["allocated_size"] for segment in pool.snapshot())
            for pool in pools
        ]

        assert held == [20 * 2**20] * 4
        assert torch.cuda.memory_allocated() == 84 * 2**20
        del pools
        kept.clear()
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
