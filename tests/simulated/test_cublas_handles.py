"""cuBLAS handles of host threads: a thread that has ended leaves its handle to others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from pytest_gpumem import simulated_device
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.kernels.cublas import SMALL


def _multiply(index: int = 0) -> None:
    with torch.cuda.device(index):
        square = torch.ones(2, 2, device="cuda")
        square @ square


def _in_new_thread(index: int = 0) -> None:
    thread = threading.Thread(target=_multiply, args=(index,))
    thread.start()
    thread.join()


def test_threads_one_after_another_share_a_handle_and_its_workspace() -> None:
    """Also if other threads, which use no card, run between them."""
    with simulated_device("T4"), ThreadPoolExecutor(3) as pool:
        for number in range(8):
            _in_new_thread()
            pool.submit(int, number).result()

        assert SMALL == torch.cuda.memory_allocated()


def test_threads_at_one_time_have_a_handle_each() -> None:
    """Their workspaces stay when they end, for those that come."""
    together = threading.Barrier(3)

    def multiply() -> None:
        together.wait()
        _multiply()
        together.wait()

    with simulated_device("T4"):
        for _round in range(2):
            threads = [threading.Thread(target=multiply) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        assert 3 * SMALL == torch.cuda.memory_allocated()
        _multiply()
        assert 3 * SMALL == torch.cuda.memory_allocated()


def test_each_card_has_handles_of_its_own() -> None:
    """A thread's handle of one card is none of another, nor of a later machine."""
    with simulated_device("T4*2"):
        _multiply(0)
        _in_new_thread(1)
        assert [SMALL, SMALL] == [torch.cuda.memory_allocated(each) for each in (0, 1)]
    with simulated_device("T4"):
        _in_new_thread()
        _multiply()
        assert {(0, 0)} == set(card_of(0).workspaces)


def test_data_parallel_uses_the_same_handles_step_after_step() -> None:
    """Each step has new threads: one for each card, beside autograd's own."""
    with simulated_device("T4*2"):
        model = torch.nn.DataParallel(torch.nn.Linear(4, 4).cuda())
        for _step in range(5):
            model(torch.ones(4, 4, device="cuda")).sum().backward()

        assert [2, 2] == [len(card_of(each).workspaces) for each in (0, 1)]
