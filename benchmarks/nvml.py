"""How much sampling NVML slows down other code: python benchmarks/nvml.py.

The same small training runs with the sampler and without, in turn; the ratio is of the
processor time of the whole process, the sampler's thread included. Uses the machine's
cards where there are some, else eight simulated ones, whose NVML is Python and takes the
interpreter's lock.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

import torch

from pytest_gpumem import simulated_device
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.instruments.sampler import PERIOD_S, MemorySampler

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

ROUNDS = 20
STEPS = 300


def train() -> None:
    """Train for a while, by many small operations that all need the interpreter."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4))).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    batch = torch.ones(16, 128, device="cuda")
    for _ in range(STEPS):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()


def spend(block: AbstractContextManager[object]) -> tuple[float, float]:
    """Return the processor's and the clock's seconds of the work in a block."""
    processor_s, wall_s = time.process_time(), time.perf_counter()
    with block:
        train()
    return time.process_time() - processor_s, time.perf_counter() - wall_s


def half(values: list[float]) -> float:
    """Return the mean of the faster half, which other programs disturbed least."""
    return statistics.fmean(sorted(values)[: len(values) // 2])


def main() -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(simulated_device("T4*8"))
        device = active_device()
        name = f"{device.device_count} x {device.name(0)}, {device.kind}"
        train()
        sampler = MemorySampler(period_s=60)
        begin = time.thread_time()
        for _ in range(100):
            sampler.sample()
        sample_ms = (time.thread_time() - begin) * 10
        timings: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
        for _ in range(ROUNDS):
            timings["without"].append(spend(nullcontext()))
            timings["with"].append(spend(MemorySampler()))
    print(f"{name}; a sample every {PERIOD_S * 1000:.0f} ms at most")
    print(f"one sample of every card: {sample_ms:.3f} ms of a processor")
    for what, place in (("processor", 0), ("wall", 1)):
        own, bare = (
            half([each[place] for each in timings[key]]) for key in ("with", "without")
        )
        print(f"{what:>9}: {own:.3f} s with, {bare:.3f} s without, {own / bare:.4f}")


if __name__ == "__main__":
    main()
