"""MONAI: ``SlidingWindowInfererAdapt`` stitches on the card, then in buffers, then not."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from evidence import CountOoms
from torch import nn

from pytest_gpumem import OomInjector
from pytest_gpumem.rules.rule import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Callable

#: An image whose eight channels of output are 24 MiB; a window's are 1 MiB.
SHAPE = (1, 1, 64, 64, 192)
WINDOW = (32, 32, 32)


@pytest.fixture
def network() -> nn.Module:
    """A small segmentation network on the host."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 8, 1)).eval()


@pytest.fixture
def image() -> torch.Tensor:
    """An image on the host."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def make() -> Callable[..., Any]:
    """A function that makes the adaptive inferer.

    MONAI is imported late, for PyKEEN, in another module here, registers every learning
    rate scheduler that it finds, and MONAI's have names of torch's. And it is imported
    here, not in a test, for it imports optuna, which keeps the traceback of an optional
    dependency that is not there, and with it the local variables of every caller.
    """
    from monai.inferers import SlidingWindowInfererAdapt

    return partial(SlidingWindowInfererAdapt, WINDOW)


def _infer(inferer: Any, image: torch.Tensor, network: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = inferer(image, network)
    return result


@pytest.mark.parametrize(
    ("budget", "buffer_steps", "num_ooms", "ends_on"),
    [
        ("80MiB", None, 0, "cuda"),
        ("44MiB", None, 1, "cpu"),
        ("44MiB", 4, 1, "cpu"),
        ("44MiB", -1, 1, "cpu"),
    ],
    ids=["fits", "buffered", "in larger buffers", "without buffers"],
)
def test_each_budget_ends_on_its_rung(
    make: Callable[..., Any],
    image: torch.Tensor,
    network: nn.Module,
    vram_budget: Callable[..., Any],
    *,
    budget: str,
    buffer_steps: int | None,
    num_ooms: int,
    ends_on: str,
) -> None:
    """The output is the CPU's wherever it was stitched."""
    expected = _infer(make(), image, network)
    inferer = make(buffer_steps=buffer_steps)
    network.cuda()
    on_card = image.cuda()

    with vram_budget(budget), CountOoms() as ooms:
        result = _infer(inferer, on_card, network)

    assert ooms.num == num_ooms
    assert result.device.type == ends_on
    torch.testing.assert_close(result.cpu(), expected)


def test_buffers_that_are_too_large_are_halved(
    make: Callable[..., Any],
    image: torch.Tensor,
    network: nn.Module,
    oom_injector: OomInjector,
) -> None:
    """First whole, then four steps, two, one, and at last without buffers."""
    expected = _infer(make(), image, network)
    inferer = make(buffer_steps=4)
    network.cuda()
    on_card = image.cuda()

    rule = oom_injector.arm("forward:nth=1,times=4")
    result = _infer(inferer, on_card, network)

    assert rule.num_failed == 4
    assert result.device.type == "cpu"
    torch.testing.assert_close(result, expected)


def test_only_one_class_of_error_is_an_oom(
    make: Callable[..., Any], network: nn.Module
) -> None:
    """A finding: it asks for the class's name, so RuntimeErrors of old are not known.

    ``CUDA error: out of memory`` and cuBLAS's and cuDNN's errors end the inference.
    """
    network.cuda()
    on_card = torch.ones(1, 1, 32, 32, 48).cuda()
    survived = set()
    for flavour in FLAVOURS:
        inferer = make()
        with OomInjector(f"forward:flavour={flavour}") as injector:
            try:
                _infer(inferer, on_card, network)
            except (RuntimeError, MemoryError):
                pass
            else:
                survived.add(flavour)
        assert injector.num_injected == 1

    assert survived == {"native", "async", "hip", "xpu"}


def test_an_oom_in_the_importance_map_is_not_seen_as_one(
    make: Callable[..., Any], network: nn.Module, oom_injector: OomInjector
) -> None:
    """A finding: every error there is wrapped, and the wrapping is not an OOM by name."""
    network.cuda()
    on_card = torch.ones(1, 1, 32, 32, 48).cuda()

    rule = oom_injector.arm("any")
    with pytest.raises(RuntimeError, match="Seems to be OOM") as caught:
        _infer(make(), on_card, network)

    assert rule.num_failed == 1
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
