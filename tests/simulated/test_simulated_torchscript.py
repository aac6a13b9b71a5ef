"""TorchScript beside the simulated device: libraries script as they are imported."""

from __future__ import annotations

import pytest
import torch

from pytest_gpumem import OomInjector
from pytest_gpumem.devices.simulated.install import simulated_device

# A DeprecationWarning up to torch 2.14, a FutureWarning since.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated")


def _made(x: torch.Tensor, device: torch.device, size: int) -> torch.Tensor:
    """Use what the simulated device replaces."""
    first = torch.zeros(size, device=device) + torch.ones_like(x)
    second = torch.as_tensor(2.0, device=x.device, dtype=x.dtype)
    return first + second + torch.tensor([3.0], device=device) + torch.arange(size)[0]


def _moved(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.to(like.device) + like


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_function_is_scripted_while_cards_are_simulated(device: str) -> None:
    """With constructors in it, for host and card."""
    with simulated_device("T4"):
        scripted = torch.jit.script(_made)
        x = torch.ones(3, device=device)
        made = scripted(x, torch.device(device), 3)
        moved = torch.jit.script(_moved)(torch.ones(3), x)

        assert device == str(made.device) == str(moved.device)
        assert [6.0, 6.0, 6.0] == made.tolist()
        assert [2.0, 2.0, 2.0] == moved.tolist()


def test_what_was_scripted_before_runs_on_a_card_and_after() -> None:
    """The same function meets a card, an OOM on it, and the host again."""
    scripted = torch.jit.script(_moved)
    host = torch.ones(3)
    with simulated_device("T4"):
        assert scripted(host, torch.ones(3, device="cuda")).is_cuda
        like = torch.ones(3, device="cuda")
        with (
            OomInjector("any:nth=2") as injector,
            pytest.raises(torch.OutOfMemoryError),
        ):
            scripted(host, like)
        assert injector.num_injected == 1

    assert [2.0, 2.0, 2.0] == scripted(host, host).tolist()


def test_a_function_scripted_beside_cards_outlives_them() -> None:
    """Its code is compiled once and holds nothing of theirs."""
    with simulated_device("T4"):
        scripted = torch.jit.script(_made)

    made = scripted(torch.ones(2), torch.device("cpu"), 2)
    assert [6.0, 6.0] == made.tolist()


class _Scaled(torch.nn.Module):
    """A layer inside, a buffer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(source) * self.scale
        return result


def test_a_scripted_module_moves_with_its_parameters() -> None:
    """C++ holds them: it computes and trains on the card, and back on the host."""
    with simulated_device("T4"):
        module = torch.jit.script(_Scaled())
        weight = module.linear.weight
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        expected = module(torch.ones(2, 4)).detach()

        module.cuda()
        result = module(torch.ones(2, 4, device="cuda"))
        result.sum().backward()
        before = weight.detach().clone()
        optimizer.step()

        assert module.linear.weight is weight
        assert ("cuda:0", "cuda:0") == (str(weight.device), str(weight.grad.device))
        assert torch.equal(result.cpu(), expected)
        assert torch.equal(weight, before - 2.0)
        module.cpu()
        assert "cpu" == str(module(torch.ones(2, 4)).device)
        assert torch.equal(weight, before.cpu() - 2.0)
        del result, before, optimizer
        module.zero_grad()
        torch._C._cuda_clearCublasWorkspaces()
        assert 0 == torch.cuda.memory_allocated()
