"""Parallel training over groups of NCCL: values, buckets, shards."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch._C import _distributed_c10d as c10d
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from versions import TORCH, since

from pytest_gpumem.devices.simulated.install import simulated_device

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts functions when it is imported
    from torch.distributed.optim import ZeroRedundancyOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore")

#: ``DTensor`` of torch 2.8 has no rule for some operators.
WITH_NEW_RULES = pytest.mark.skipif(
    not hasattr(
        DTensor._op_dispatcher.sharding_propagator, "op_single_dim_strategy_funcs"
    ),
    reason="DTensor has no rule for it",
)
#: NCCL for several cards of one process; a group that torch 2.15 calls ``nccl`` has one.
OF_ALL_CARDS = "nccl-legacy" if TORCH >= (2, 15) else "nccl"


def network() -> nn.Sequential:
    """Return a small model, the same on every rank, without drawing from a generator."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(torch.arange(each.numel()).cos().reshape(each.shape) / 4)
    return model


def losses(wrap: Callable[[nn.Module], Any], rank: int, **options: Any) -> list[float]:
    """Return a rank's losses over three steps of a wrapped model on its card."""
    model = wrap(network().cuda())
    make = options.get("optimizer", torch.optim.AdamW)
    optimizer = make(model.parameters(), lr=0.01)
    inputs = torch.arange(48.0, device="cuda").reshape(6, 8).cos() + rank
    found = []
    for _step in range(3):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def expected(count: int) -> list[list[float]]:
    """Return each rank's losses as one process computes them on the host."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    base = torch.arange(48.0).reshape(6, 8).cos()
    found: list[list[float]] = [[] for _ in range(count)]
    for _step in range(3):
        for rank in range(count):
            loss = model(base + rank).square().mean()
            (loss / count).backward()
            found[rank].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_way_to_train_in_parallel_computes_the_same(count: int) -> None:
    """Replicas with buckets, hooks and sharded optimisers, and sharded models."""

    def body(rank: int) -> dict[str, list[float]]:
        def hooked(model: nn.Module) -> nn.Module:
            wrapped = DistributedDataParallel(model, [rank])
            wrapped.register_comm_hook(None, default_hooks.allreduce_hook)
            return wrapped

        def sharded(model: nn.Module) -> nn.Module:
            for layer in model.children():
                if isinstance(layer, nn.Linear):
                    fully_shard(layer)
            fully_shard(model)
            return model

        def zero(parameters: Any, lr: float) -> Any:
            return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=lr)

        def replica(**options: Any) -> Callable[[nn.Module], nn.Module]:
            return lambda model: DistributedDataParallel(model, [rank], **options)

        return {
            "buckets": losses(replica(bucket_cap_mb=0.0001), rank),
            "views": losses(replica(gradient_as_bucket_view=True), rank),
            "unused": losses(replica(find_unused_parameters=True), rank),
            "static": losses(replica(static_graph=True), rank),
            "hook": losses(hooked, rank),
            "zero": losses(replica(), rank, optimizer=zero),
            "sharded": losses(sharded, rank),
        }

    results = run_ranks(body, count=count, cards=f"T4*{count}")

    for found, right in zip(results, expected(count), strict=True):
        for way, values in found.items():
            assert values == pytest.approx(right, rel=1e-5), way


def test_a_model_on_two_cards_has_buckets_on_each() -> None:
    """Bytes for the gradients of a card's parameters lie on that card."""

    def body(rank: int) -> None:
        first, second = (torch.device("cuda", 2 * rank + each) for each in range(2))

        class Halves(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left = nn.Linear(256, 512, bias=False).to(first)
                self.right = nn.Linear(512, 128, bias=False).to(second)
                with torch.no_grad():
                    self.left.weight.fill_(0.01)
                    self.right.weight.fill_(0.01)

            def forward(self, inputs: torch.Tensor) -> torch.Tensor:
                found: torch.Tensor = self.right(self.left(inputs).to(second))
                return found

        model = Halves()
        before = [torch.cuda.memory_allocated(each) for each in (first, second)]
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
        after = [torch.cuda.memory_allocated(each) for each in (first, second)]
        assert [new - old for new, old in zip(after, before, strict=True)] == [
            model.left.weight.nbytes,
            model.right.weight.nbytes,
        ]
        for _step in range(2):
            model.zero_grad(set_to_none=False)
            wrapped(torch.full((2, 256), rank + 1.0, device=first)).sum().backward()
            for layer, device in ((model.left, first), (model.right, second)):
                assert layer.weight.grad is not None
                assert layer.weight.grad.device == device
        mean = 2 * 1.5 * 256 * 0.01  # rows, of 1 on one rank and of 2 on the other
        assert model.right.weight.grad is not None
        assert torch.allclose(
            model.right.weight.grad, torch.tensor(mean, device=second)
        )

    run_ranks(body, backend=OF_ALL_CARDS, cards="T4*4")


def test_bytes_alone_need_no_values() -> None:
    """A machine that keeps none trains in parallel, too: what is held is the same."""

    def held(values: str) -> tuple[int, ...]:
        with simulated_device("A100-40GB", values=values):
            dist.init_process_group(
                "nccl", store=c10d.HashStore(), rank=0, world_size=1
            )
            try:
                layer = nn.Linear(1024, 1024).cuda()
                replica = DistributedDataParallel(layer, [0])
                replica(torch.empty(2, 1024, device="cuda")).sum().backward()
                shards = nn.Linear(1024, 1024).cuda()
                fully_shard(shards)
                shards(torch.empty(2, 1024, device="cuda")).sum().backward()
                gathered = torch.empty(2, 1024, device="cuda")
                dist.all_gather_into_tensor(gathered, gathered.clone())
                return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            finally:
                dist.destroy_process_group()

    assert held("none") == held("computed")


def test_shards_move_from_one_dimension_to_another() -> None:
    """``DTensor`` gathers, scatters and exchanges through NCCL."""

    def body(rank: int) -> None:
        mesh = init_device_mesh("cuda", (2,))
        whole = torch.arange(8.0, device="cuda").reshape(4, 2)
        rows = distribute_tensor(whole, mesh, [Shard(0)])
        assert rows.redistribute(mesh, [Replicate()]).to_local().tolist() == (
            whole.tolist()
        )
        columns = rows.redistribute(mesh, [Shard(1)]).to_local()
        assert columns.tolist() == whole[:, rank : rank + 1].tolist()
        assert columns.device.index == rank
        total = rows.sum()
        assert isinstance(total, DTensor)
        assert total.full_tensor().item() == 28
        norm = nn.utils.clip_grad_norm_
        parameter = nn.Parameter(rows)
        gradient = distribute_tensor(whole.clone(), mesh, [Shard(0)])
        parameter.grad = gradient
        norm([parameter], 1.0)
        clipped = gradient.full_tensor()
        assert clipped.norm().item() == pytest.approx(1.0, rel=1e-4)

    run_ranks(body)


@pytest.mark.parametrize(
    "draw",
    [
        "uniform_",
        "normal_",
        "bernoulli_",
        *(
            pytest.param(each, marks=WITH_NEW_RULES)
            for each in ("exponential_", "geometric_", "cauchy_", "log_normal_")
        ),
    ],
)
def test_a_sharded_tensor_draws_in_place(draw: str) -> None:
    """``DTensor`` looks for the shape of a result with fake tensors of the card."""
    arguments = (0.5,) if draw == "geometric_" else ()

    def body(_rank: int) -> None:
        mesh = init_device_mesh("cuda", (2,))
        rows = distribute_tensor(
            torch.full((4, 2), -1.0, device="cuda"), mesh, [Shard(0)]
        )
        getattr(rows, draw)(*arguments)
        local = rows.to_local()
        assert local.is_cuda
        assert local.shape == (2, 2)
        assert not local.eq(-1).any()

    run_ranks(body)


def test_replicas_must_be_of_one_shape() -> None:
    """As torch says it, on the rank that differs from the first."""

    def body(rank: int) -> None:
        model = nn.Linear(4, 2 + rank).cuda()
        if rank:
            with pytest.raises(RuntimeError, match=r"sizes .* appears not to match"):
                DistributedDataParallel(model, [rank])
        else:
            with pytest.raises(dist.DistBackendError):
                DistributedDataParallel(model, [rank])

    run_ranks(body, seconds=1)


def test_one_batch_on_two_ranks_is_normalised_as_one() -> None:
    """``SyncBatchNorm``: values, gradients and running figures of the whole batch."""
    whole = torch.arange(96.0).cos().reshape(8, 3, 4)
    plain = nn.BatchNorm1d(3)
    host = whole.clone().requires_grad_()
    right = plain(host)
    right.square().sin().sum().backward()
    assert host.grad is not None

    def body(rank: int) -> None:
        rows = slice(3 * rank, 3 + 5 * rank)  # three and five
        layer = nn.SyncBatchNorm(3).cuda()
        inputs = whole[rows].cuda().requires_grad_()
        wrapped = DistributedDataParallel(layer, [rank])
        found = wrapped(inputs)
        found.square().sin().sum().backward()
        assert host.grad is not None
        assert inputs.grad is not None
        for ours, theirs in (
            (found, right[rows]),
            (inputs.grad, host.grad[rows]),
            (layer.running_mean, plain.running_mean),
            (layer.running_var, plain.running_var),
        ):
            assert ours is not None
            assert theirs is not None
            assert ours.device.index == rank
            assert torch.allclose(ours.cpu(), theirs, atol=1e-5)
        assert layer.weight.grad is not None
        assert plain.weight.grad is not None
        both = layer.weight.grad.cpu() * 2  # a mean of the ranks' parts
        assert torch.allclose(both, plain.weight.grad, atol=1e-4)

    run_ranks(body)


@since(2, 11, "a barrier's tensor is a static variable of C++, one for all threads")
def test_what_nobody_has_waited_for_is_kept_until_the_next_collective() -> None:
    """The tensors of an asynchronous collective, and so the last bucket of a replica."""

    def body(_rank: int) -> list[int]:
        def held() -> int:
            return torch.cuda.memory_allocated() - before

        found = []
        dist.barrier()
        before = torch.cuda.memory_allocated()
        dist.all_reduce(
            torch.ones(1000, device="cuda"), async_op=True
        ).get_future().wait()
        found.append(held())
        dist.barrier()
        found.append(held())
        dist.all_reduce(torch.ones(1000, device="cuda"), async_op=True).wait()
        found.append(held())
        dist.all_reduce(torch.ones(1000, device="cuda"))
        found.append(held())

        replica = DistributedDataParallel(nn.Linear(500, 2, bias=False).cuda())
        replica(torch.ones(1, 500, device="cuda")).sum().backward()
        torch._C._cuda_clearCublasWorkspaces()  # no public name
        del replica
        gc.collect()
        found.append(held())
        dist.barrier()
        found.append(held())
        return found

    assert [[4096, 0, 0, 0, 4096, 0]] * 2 == run_ranks(body, backend=OF_ALL_CARDS)
