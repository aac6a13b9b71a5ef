"""torchrun with gloo and NCCL: each rank has its card, its budget and its peaks."""

from __future__ import annotations

import json

import pytest
import torch  # noqa: F401  # before an in-process run

pytest_plugins = ["pytester"]

RANK = """
import gc
import os
import time
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from pytest_gpumem import vram_budget

dist.init_process_group("BACKEND")
rank, world = int(os.environ["LOCAL_RANK"]), dist.get_world_size()
torch.cuda.set_device(rank)
assert torch.cuda.device_count() == world
assert torch.cuda.mem_get_info()[0] == (192 - 16 * rank) * 2**20

total = torch.full((4,), rank + 1.0, device="cuda")
dist.all_reduce(total)
assert total.tolist() == [sum(range(1, world + 1))] * 4

def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512, bias=False) for _ in range(12)]
    return torch.nn.Sequential(*layers).cuda()

def train(made):
    optimizer = torch.optim.AdamW(made.parameters())
    for _ in range(2):
        loss = made(torch.ones(4, 512, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()

def held(wrap):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    made = wrap(model())
    loss = train(made)
    return loss, torch.cuda.memory_allocated() - before

mesh = init_device_mesh("cuda", (world,))

def replicated(made):
    return torch.nn.parallel.DistributedDataParallel(made, [rank])

def sharded(made):
    for layer in made:
        fully_shard(layer, mesh=mesh)
    return fully_shard(made, mesh=mesh)

plain = held(lambda made: made)
ddp = held(replicated)
own = held(sharded)
older = held(lambda made: FullyShardedDataParallel(made, device_id=rank))
for loss, _held in (ddp, own, older):
    assert abs(loss - plain[0]) < 1e-5, (loss, plain)
assert own[1] < ddp[1] and older[1] < ddp[1], (own, ddp, older)

# A mesh is not needed; shards and their gradients say that they are on the card.
bare = model()
for layer in bare:
    fully_shard(layer)
fully_shard(bare)
assert abs(train(bare) - plain[0]) < 1e-5
bare(torch.ones(4, 512, device="cuda")).sum().backward()
for each in bare.parameters():
    for tensor in (each, each.grad):
        assert tensor.is_cuda and tensor.device.index == rank, tensor.device
        assert type(tensor).__name__ == "DTensor", type(tensor)

def taken_since(before, expected):
    # Garbage, and what threads of gloo have just carried, may go a moment later.
    until = time.monotonic() + 5
    while True:
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        taken = torch.cuda.memory_allocated() - before
        if taken == expected or time.monotonic() > until:
            return taken
        time.sleep(0.01)

# A bucket byte for each parameter byte, from the wrapping on; gradients may be views.
for is_view in (False, True):
    dist.barrier()
    gc.collect()  # what FSDP and DDP leave in cycles goes at no certain time
    made = model()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    wrapped = torch.nn.parallel.DistributedDataParallel(
        made, [rank], gradient_as_bucket_view=is_view
    )
    nbytes = sum(each.nbytes for each in made.parameters())
    taken = taken_since(before, nbytes)
    assert taken == nbytes, (is_view, taken, nbytes)
    wrapped(torch.full((4, 512), rank + 1.0, device="cuda")).sum().backward()
    grads = [each.grad for each in made.parameters()]
    assert all(each.is_cuda and each.device.index == rank for each in grads)
    expected = nbytes * (1 if is_view else 2)
    taken = taken_since(before, expected)
    assert taken == expected, (is_view, taken, expected)
    first = grads[0].clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, grads[0])
    del made, wrapped, grads, first
del bare, each, tensor, layer

# Shards fit a budget that a whole copy with its optimizer does not.
gc.collect()
with vram_budget("84MiB", device_index=rank):
    assert held(sharded)[0] == own[0]
    try:
        held(replicated)
    except torch.OutOfMemoryError as error:
        assert "84.00 MiB allowed" in str(error), error
    else:
        raise AssertionError("a replica fits, too")
if rank == world - 1:
    try:
        torch.empty((192 - 16 * rank) * 2**20, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("the rank's own budget does not hold")
dist.destroy_process_group()
"""

START = """
import subprocess
import sys

import pytest

def start(world):
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={world}", "rank.py",
        ],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "backend"),
    [(2, "nccl"), (4, "gloo")],
)
def test_ranks_have_a_card_a_budget_and_a_limit_each(
    world: int, backend: str, pytester: pytest.Pytester
) -> None:
    """DDP and both FSDPs compute what one card does; peaks come back by card."""
    pytester.makepyfile(rank=RANK.replace("BACKEND", backend))
    last = world - 1
    pytester.makepyfile(
        test_it=f"""{START}
@pytest.mark.max_vram("1MiB", phase="children", device={last})
@pytest.mark.max_vram("180MiB", phase="children", device=0)
def test_it():
    start({world})
"""
    )
    budgets = ",".join(f"{rank}={192 - 16 * rank}MiB" for rank in range(world))
    result = pytester.runpytest_inprocess(
        f"--gpu-card=T4*{world}", f"--gpu-budget={budgets}", "-p", "no:cacheprovider"
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [f"peak VRAM above max_vram: allocated * on cuda:{last}, limit 1 MiB *"]
    )
    result.stdout.fnmatch_lines_random(
        [
            f"* {1 + (rank == last)} * (children) [[]cuda:{rank}]"
            for rank in range(world)
        ]
    )


@pytest.mark.slow
def test_a_baseline_gates_every_rank(pytester: pytest.Pytester) -> None:
    """The rank that needs more is named, and no other."""
    pytester.makepyfile(
        rank="""
        import os
        import pathlib
        import torch

        rank = int(os.environ["LOCAL_RANK"])
        more = pathlib.Path("more").exists() and rank == 2
        mib = 8 * (rank + 1) + more
        torch.zeros(mib * 2**20, dtype=torch.uint8, device=f"cuda:{rank}")
        """
    )
    pytester.makepyfile(test_it=f"{START}\ndef test_it():\n    start(4)\n")
    options = ("--gpu-card=T4*4", "--gpu-baseline=peaks.json", "-p", "no:cacheprovider")

    written = pytester.runpytest_inprocess(*options, "--gpu-update-baseline")
    text = (pytester.path / "peaks.json").read_text(encoding="utf-8")
    (pytester.path / "more").touch()
    grown = pytester.runpytest_inprocess(*options)

    written.assert_outcomes(passed=1)
    for key in ("children allocated", "children cuda:3 allocated"):
        assert key in text
    assert (
        32 * 2**20
        in json.loads(text)["peaks"][_environment(text)]["test_it.py::test_it"].values()
    )
    grown.assert_outcomes(failed=1)
    grown.stdout.fnmatch_lines(
        ["VRAM growth above the baseline peaks.json: *children cuda:2 allocated*"]
    )
    said = grown.stdout.str().partition("VRAM growth above")[2]
    assert "children cuda:1 allocated" not in said
    assert "children cuda:3 allocated" not in said


def _environment(text: str) -> str:
    (environment,) = json.loads(text)["peaks"]
    return str(environment)


@pytest.mark.slow
def test_the_others_hear_of_a_rank_that_ran_out_of_memory(
    pytester: pytest.Pytester,
) -> None:
    """Its process ends; theirs wait for it no longer than for the news."""
    pytester.makepyfile(
        rank="""
        import pathlib
        import signal
        import torch
        import torch.distributed as dist

        # torchrun ends the others at once; this one says first what it has heard.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.init_process_group("nccl")
        rank = dist.get_rank()
        torch.cuda.set_device(rank)
        tensor = torch.ones(1, device="cuda")
        dist.all_reduce(tensor)
        if rank:
            torch.empty(2**50, device="cuda")
        try:
            dist.all_reduce(tensor)
        except dist.DistBackendError as error:
            pathlib.Path("said").write_text(str(error))
            raise
        """
    )
    pytester.makepyfile(test_it=f"{START}\ndef test_it():\n    start(2)\n")

    result = pytester.runpytest_inprocess("--gpu-card=T4*2", "-p", "no:cacheprovider")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*torch.OutOfMemoryError: CUDA out of memory*"])
    assert "ncclRemoteError" in (pytester.path / "said").read_text(encoding="utf-8")
