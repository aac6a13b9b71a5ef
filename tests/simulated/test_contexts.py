"""The context of a process on a simulated card: when it comes, and who counts it."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20
CONTEXT = 300 * MIB


@pytest.fixture(autouse=True)
def _cards() -> Iterator[None]:
    """Two simulated cards, with a context of 300 MiB each."""
    with simulated_device("1GiB,ctx=300MiB*2"):
        yield


def _contexts() -> list[int]:
    device = active_device()
    return [device.context_bytes(index) for index in range(2)]


USES: list[Callable[[], Any]] = [
    lambda: torch.zeros(1, device="cuda:1"),
    lambda: torch.cuda.mem_get_info(1),
    lambda: torch.cuda.synchronize(1),
    lambda: torch.accelerator.synchronize(1),
    lambda: torch.cuda.set_device(1),
    lambda: torch.cuda.Stream(1),
    lambda: torch.Event().record(torch.Stream("cuda:1")),
    lambda: torch.cuda.device(1).__enter__(),
]

LOOKS: list[Callable[[], Any]] = [
    torch.cuda.is_available,
    torch.cuda.device_count,
    lambda: torch.cuda.get_device_name(1),
    lambda: torch.cuda.get_device_properties(1),
    lambda: torch.cuda.memory_allocated(1),
    lambda: torch.cuda.memory_stats(1),
    torch.cuda.current_device,
    torch.cuda.init,
    lambda: torch.device("cuda", 1),
    lambda: active_device().mem_get_info(1),
    lambda: torch.cuda.set_per_process_memory_fraction(0.5, 1),
]


@pytest.mark.parametrize("use", USES)
def test_the_first_use_of_a_card_makes_a_context(use: Callable[[], Any]) -> None:
    """On that card alone; a second use makes no other."""
    use()
    use()

    assert [0, CONTEXT] == _contexts()


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_makes_no_context(look: Callable[[], Any]) -> None:
    """CUDA makes none for what needs none, and the plugin's own looks neither."""
    look()

    assert [0, 0] == _contexts()


def test_the_context_stays_until_the_end() -> None:
    """Neither an empty cache nor deleted tensors take it away."""
    kept = torch.zeros(MIB, device="cuda")
    del kept
    torch.cuda.empty_cache()

    assert 2**30 - CONTEXT == torch.cuda.mem_get_info()[0]


def test_the_text_of_an_oom_counts_the_context() -> None:
    """As memory that is not PyTorch's."""
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.zeros(2**30, dtype=torch.uint8, device="cuda")

    assert "of which 724.00 MiB is free" in str(caught.value)
    assert re.search(
        r"Including non-PyTorch memory, this process has 300\.00 MiB memory in use",
        str(caught.value),
    )


def test_a_card_without_room_for_a_context_says_cuda_error() -> None:
    """The caching allocator has no words of its own for it; the error keeps nothing."""
    with simulated_device("64MiB,ctx=60MiB") as machine:
        machine.cards[0].driver.other_bytes = 8 * MIB
        with pytest.raises(torch.AcceleratorError, match="CUDA error: out of memory"):
            torch.zeros(1, device="cuda")
        with pytest.raises(torch.AcceleratorError, match="CUDA error: out of memory"):
            torch.cuda.mem_get_info()
        assert 0 == machine.cards[0].context_bytes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_has_no_context() -> None:
    """It has its parent's tensors, and may not use them."""
    kept = torch.zeros(1, device="cuda")
    child = os.fork()
    if not child:
        os._exit(int(active_device().context_bytes(0) != 0))
    _pid, status = os.waitpid(child, 0)

    assert 0 == os.waitstatus_to_exitcode(status)
    assert [CONTEXT, 0] == _contexts()
    del kept
