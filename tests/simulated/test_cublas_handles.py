"""cuBLAS handles of host threads: a thread that has ended leaves its handle to others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem import simulated_device
from pytest_gpumem.allocator.versions import NEWEST
from pytest_gpumem.devices.simulated import machine as machine_module
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.kernels.cublas import OF_LT, SMALL

if TYPE_CHECKING:
    from collections.abc import Callable


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


def _on(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(*shape, device="cuda", **options)


#: What torch 2.15 requests on the substitute runtime of tests/cuda_host: the result, copies
#: that are held beside it, and the workspace.
REQUESTS: dict[str, tuple[Callable[..., Any], list[int]]] = {
    "mm": (lambda x, _v: x @ x, [16384, SMALL]),
    "mm of columns": (lambda x, _v: x[:, ::2] @ x[::2], [16384, 8192, SMALL]),
    "mm into a result": (lambda x, _v: torch.mm(x, x, out=x.clone()), [16384, SMALL]),
    "mm of nothing": (lambda x, _v: x[:0] @ x, []),
    "bmm": (lambda x, _v: x[None].bmm(x[None]), [16384, SMALL]),
    "mv": (lambda x, v: x @ v, [512, SMALL]),
    "dot": (lambda _x, v: v @ v, [512, SMALL]),
    "addmm": (lambda x, _v: torch.addmm(x, x, x), [16384, SMALL]),
    "addmm_": (lambda x, _v: x.addmm_(x, x), [SMALL]),
    "a bias": (lambda x, v: torch.addmm(v, x, x), [16384, OF_LT]),
    "a bias that is a row": (lambda x, v: torch.addmm(v[None], x, x), [16384, OF_LT]),
    "a bias with a factor": (
        lambda x, v: torch.addmm(v, x, x, beta=2),
        [16384, SMALL],
    ),
    "a bias with a pace": (
        lambda x, _v: torch.addmm(x[:, 0], x, x),
        [16384, SMALL],
    ),
    "a bias of a column": (
        lambda x, v: torch.addmm(v[:1], x, x[:, :1]),
        [512, SMALL],
    ),
    "an activation": (
        lambda x, v: torch._addmm_activation(v, x, x),
        [16384, OF_LT],
    ),
    "a sum of products": (
        lambda x, _v: torch.addbmm(x, x.expand(3, -1, -1), x.expand(3, -1, -1)),
        [16384, SMALL, SMALL, SMALL],
    ),
    "an outer product": (lambda x, v: torch.addr(x, v, v), [16384]),
    "a triangular system": (
        lambda x, _v: torch.linalg.solve_triangular(x, x, upper=True),
        [16384, SMALL],
    ),
    "a linear layer": (
        lambda x, v: torch.nn.functional.linear(x[None], x, v),
        [16384, OF_LT],
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_from_torch_2_15_on_a_product_frees_its_workspace(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is held beside the results and the copies, and no longer."""
    monkeypatch.delenv("TORCH_CUBLAS_WORKSPACE_CACHE")
    monkeypatch.setattr(machine_module, "installed_version", lambda: NEWEST)
    function, expected = REQUESTS[name]
    changes: list[int] = []
    with simulated_device("T4") as machine:
        operands = _on(64, 64), _on(64)
        held = torch.cuda.memory_allocated()
        machine.cards[0].tracers.append(lambda *change: changes.append(change[2]))
        result = function(*operands)
        kept = torch.cuda.memory_allocated() - held

    size = 0 if result is operands[0] else result.nbytes
    assert expected == [each for each in changes if each > 0]
    assert -(-size // 512) * 512 == kept
