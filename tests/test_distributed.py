"""torchrun with gloo: each rank has its card, its budget and its peaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch  # noqa: F401  # before an in-process run

if TYPE_CHECKING:
    import pytest

pytest_plugins = ["pytester"]

RANK = """
import os
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

dist.init_process_group("gloo")
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
assert torch.cuda.mem_get_info()[0] == (128 if rank == 0 else 96) * 2**20

total = torch.full((4,), rank + 1.0, device="cuda")
dist.all_reduce(total)
assert total.tolist() == [3.0] * 4

def model():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512) for _ in range(4)]
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
    before = torch.cuda.memory_allocated()
    made = wrap(model())
    loss = train(made)
    return loss, torch.cuda.memory_allocated() - before

plain = held(lambda made: made)
ddp = held(lambda made: torch.nn.parallel.DistributedDataParallel(made, [rank]))
mesh = init_device_mesh("cuda", (2,))
sharded = held(lambda made: fully_shard(made, mesh=mesh))
older = held(lambda made: FullyShardedDataParallel(made, device_id=rank))
for loss, _held in (ddp, sharded, older):
    assert abs(loss - plain[0]) < 1e-5, (loss, plain)
assert sharded[1] < ddp[1] and older[1] < ddp[1]
if rank == 1:
    try:
        torch.empty(100 * 2**20, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("the rank's own budget does not hold")
dist.destroy_process_group()
"""


def test_ranks_have_a_card_a_budget_and_a_gate_each(
    pytester: pytest.Pytester,
) -> None:
    """DDP and both FSDPs compute what one card does; peaks come back by card."""
    pytester.makefile(".py", rank=RANK)
    pytester.makepyfile(
        test_it="""
        import subprocess
        import sys

        import pytest

        @pytest.mark.max_vram("1MiB", phase="children", device=1)
        def test_it():
            done = subprocess.run(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node=2", "rank.py",
                ],
                capture_output=True,
                text=True,
            )
            assert not done.returncode, done.stderr
        """
    )

    result = pytester.runpytest_inprocess(
        "--gpu-card=T4*2", "--gpu-budget=0=128MiB,1=96MiB", "-p", "no:cacheprovider"
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["peak VRAM above max_vram: allocated * on cuda:1, limit 1 MiB *"]
    )
    result.stdout.fnmatch_lines_random(
        ["* test_it.py::test_it (children) [[]cuda:0]", "* 1 * (children) [[]cuda:1]"]
    )
