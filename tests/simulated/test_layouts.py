"""Gradients of attention: the card's strides, and the CPU's bits whatever follows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional

from pytest_gpumem import simulated_device
from pytest_gpumem.devices.simulated.layouts import TWO_LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("A100-80GB"):
        yield
        MASKS.clear()


#: The gradient of the mask of each call.
MASKS: list[torch.Tensor] = []


def _made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _attend(device: str, see: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    """Return what ``see`` makes of the gradient of a query.

    The mask is learned, for which the CPU composes attention of products: its gradients
    have heads before rows.
    """
    query, key, value = (
        _made(2, 4, 37, 16, seed=seed).to(device).requires_grad_() for seed in range(3)
    )
    found: list[torch.Tensor] = []
    query.register_hook(lambda grad: found.append(see(grad)))
    mask = _made(4, 37, 37, seed=4).to(device).requires_grad_()
    out = functional.scaled_dot_product_attention(
        query, key, value, mask.unsqueeze(0).expand(2, -1, -1, -1)
    )
    (out * _made(*out.shape, seed=3).to(device)).sum().backward()
    assert mask.grad is not None
    MASKS.append(mask.grad)
    return found[0]


FOLLOWING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": torch.sum,
    "sum of a dimension": lambda x: x.sum(1),
    "sum of two": lambda x: x.sum((0, 2)),
    "mean": torch.mean,
    "deviation": torch.std,
    "norm": lambda x: torch.linalg.vector_norm(x, dim=(0, 2)),
    "after a view": lambda x: x.transpose(0, 1)[1:].sum((0, 2)),
    "after pointwise operators": lambda x: (x * 2 + x.square()).sum((0, 2)),
    "after a cast": lambda x: x.double().sum((0, 2)),
    "with a view that the CPU copies for": lambda x: (
        x.transpose(1, 2).view(-1, 64).sum(0)
        if x.is_cuda
        else x.transpose(1, 2).reshape(-1, 64).sum(0)
    ),
    "of parts": lambda x: torch.cat([each.sum((0, 2)) for each in x.split(2, 1)]),
    "of a result like it": lambda x: torch.empty_like(x).copy_(x).sum((0, 2)),
    "in place": lambda x: x.mul_(3).sum((0, 2)),
    "in another type": lambda x: x.to(torch.complex64).sum((0, 2)).real,
    "product": lambda x: x @ x.transpose(-1, -2),
    "memory order": lambda x: x.as_strided((7,), (5,)) * 0,
}


@pytest.mark.parametrize("see", FOLLOWING.values(), ids=FOLLOWING)
def test_what_follows_has_the_cpus_bits(
    see: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """A reduction adds numbers in the order of the CPU's memory, not of the card's."""
    expected = _attend("cpu", see)

    found = _attend("cuda", see)

    assert torch.equal(expected, found.cpu())


def test_strides_are_the_cards() -> None:
    """CUDA's kernel returns gradients with rows before heads; the CPU's keeps the heads first."""
    assert _attend("cuda", lambda x: x).stride() == (2368, 16, 64, 1)
    assert _attend("cpu", lambda x: x).stride() == (2368, 592, 16, 1)
    assert _attend("cuda", lambda x: x * 2).stride() == (2368, 16, 64, 1)


def test_memory_order_is_the_cards() -> None:
    """``as_strided`` reads the card's memory."""
    whole = _attend("cuda", lambda x: x)
    part = _attend("cuda", lambda x: x.as_strided((64,), (1,)))

    assert torch.equal(part, whole.transpose(1, 2).flatten()[:64])


def test_a_learned_mask_gets_the_cpus_gradient() -> None:
    """As in Swin: one mask for all images, whose rows a card pads."""
    _attend("cpu", lambda x: x)
    _attend("cuda", lambda x: x)

    on_host, on_card = MASKS
    assert torch.equal(on_host, on_card.cpu())


def test_a_sum_of_gradients_has_the_cpus_bits() -> None:
    """As autograd adds the gradients of a query that is attended with twice."""

    def gradient(device: str) -> torch.Tensor:
        bias = _made(4, 1, 16, seed=5).to(device).requires_grad_()
        mask = _made(2, 4, 37, 37, seed=4).to(device).requires_grad_()
        query, key, value = (
            _made(2, 4, 37, 16, seed=seed).to(device) for seed in range(3)
        )
        query = query + bias
        for _each in range(3):
            out = functional.scaled_dot_product_attention(query, key, value, mask)
            value = value + out
        (out * key).sum().backward()
        assert bias.grad is not None
        return bias.grad

    assert torch.equal(gradient("cpu"), gradient("cuda").cpu())


def test_nothing_is_kept() -> None:
    """Once the gradients are gone, operators are computed as always."""
    grad = _attend("cuda", lambda x: x)
    assert len(TWO_LAYOUTS) > 0

    del grad

    assert len(TWO_LAYOUTS) == 0


def test_a_changed_layout_is_not_taken_for_the_noted_one() -> None:
    """A tensor that was transposed in place has other strides on the CPU, too."""
    grad = _attend("cuda", lambda x: x)
    expected = grad.cpu().transpose(1, 3).contiguous()

    grad.transpose_(1, 3)

    assert torch.equal(grad.cpu(), expected)
    assert torch.allclose(grad.sum().cpu(), expected.sum())
