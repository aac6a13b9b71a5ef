"""Interception by dispatch numbers the same allocations as the simulated card."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_gpumem.devices.interception import intercepting
from pytest_gpumem.devices.simulated.device import SimulatedDevice
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable


def _fail(_operator: Callable[[], Any], _index: int) -> Any:
    raise torch.OutOfMemoryError("refused")


def _noting(
    notes: list[tuple[int, int]],
) -> Callable[[int, int], bool]:
    """Return a callable that notes every request and fails none."""

    def fails(index: int, nbytes: int) -> bool:
        notes.append((index, nbytes))
        return False

    return fails


def _work() -> None:
    layer = nn.Linear(4, 4, device="cuda")
    inputs = torch.ones(2, 4, device="cuda")
    inputs.add_(1).view(-1)
    out = layer(inputs).relu()
    (out * 2).sum().backward()


def test_every_new_result_is_asked_about() -> None:
    """Card and bytes of each allocation agree with what the allocator served."""
    asked: list[tuple[int, int]] = []
    served: list[tuple[int, int]] = []
    with simulated_device("T4") as machine:
        with SimulatedDevice(machine).failing(_noting(served)):
            _work()
        with intercepting(_noting(asked), _fail):
            _work()

    assert served == asked


def test_a_refused_result_fails_before_its_operator() -> None:
    """The refused operator raises; the ones before and after run."""
    numbers = iter(range(100))
    with (
        simulated_device("T4"),
        intercepting(lambda _index, _nbytes: next(numbers) == 1, _fail),
    ):
        first = torch.ones(3, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="refused"):
            torch.ones(3, device="cuda")
        third = torch.ones(3, device="cuda")

    assert first.is_cuda
    assert third.is_cuda


def test_thread_pools_are_followed() -> None:
    """Work submitted to a pool inside the block is asked about too."""
    asked: list[tuple[int, int]] = []
    with (
        simulated_device("T4"),
        intercepting(_noting(asked), _fail),
        ThreadPoolExecutor(1) as pool,
    ):
        pool.submit(lambda: torch.ones(4, device="cuda")).result()

    assert [(0, 16)] == asked


def test_threads_are_followed_until_the_block_ends() -> None:
    """Threads that code starts by itself are asked about; after the block no more."""
    asked: list[tuple[int, int]] = []
    over = threading.Event()

    def work() -> None:
        torch.ones(4, device="cuda")
        over.wait(10)
        torch.ones(5, device="cuda")

    with simulated_device("T4"):
        with intercepting(_noting(asked), _fail):
            thread = threading.Thread(target=work)
            thread.start()
            while not asked:
                thread.join(0.01)
        over.set()
        thread.join()

    assert [(0, 16)] == asked


def test_nothing_is_left_behind() -> None:
    """After the block, pools submit and threads start as before."""
    submit, start = ThreadPoolExecutor.submit, threading.Thread.start
    with pytest.raises(KeyError), intercepting(lambda _i, _n: False, _fail):
        raise KeyError

    assert submit is ThreadPoolExecutor.submit
    assert start is threading.Thread.start
