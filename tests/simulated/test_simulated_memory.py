"""Bytes on the simulated device: who holds them, and until when."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from versions import has

from pytest_gpumem.cards import find_card
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

MIB = 2**20


@pytest.fixture(autouse=True)
def card() -> Iterator[SimulatedCard]:
    """A card of 64 MiB."""
    with simulated_device(find_card("64MiB,cc=8.0")) as machine:
        yield machine.cards[0]


def _mib(count: int) -> torch.Tensor:
    return torch.zeros(count * MIB, dtype=torch.uint8, device="cuda")


def test_a_tensor_holds_its_bytes_while_it_lives() -> None:
    """Allocation and release follow the Python object; blocks are of 512 bytes."""
    before = torch.cuda.memory_allocated()
    tensor = torch.zeros(100, device="cuda")
    held = torch.cuda.memory_allocated() - before
    del tensor

    assert 512 == held
    assert before == torch.cuda.memory_allocated()


def test_views_hold_the_whole_block() -> None:
    """The block goes with the last view, not with the tensor it was made for."""
    tensor = _mib(2)
    view = tensor[:10]
    del tensor
    with_view = torch.cuda.memory_allocated()
    del view

    assert 2 * MIB == with_view
    assert 0 == torch.cuda.memory_allocated()


def test_a_storage_holds_its_block() -> None:
    """untyped_storage() alone keeps the bytes."""
    storage = _mib(2).untyped_storage()

    assert 2 * MIB == torch.cuda.memory_allocated()
    del storage
    assert 0 == torch.cuda.memory_allocated()


def test_what_backward_needs_is_held_by_the_graph() -> None:
    """Saved tensors live as long as the graph that saved them."""
    weight = nn.Parameter(torch.ones(MIB, device="cuda"))
    loss = (weight * 2).exp().sum()

    held = torch.cuda.memory_allocated()
    del loss

    assert held >= 8 * MIB
    assert 4 * MIB == torch.cuda.memory_allocated()


def test_in_place_operators_allocate_nothing() -> None:
    """add_, zero_ and copies into a tensor take no new block."""
    tensor = _mib(2)
    torch.cuda.reset_peak_memory_stats()

    tensor.add_(1).zero_()
    tensor.copy_(torch.ones(2 * MIB, dtype=torch.uint8))

    assert 2 * MIB == torch.cuda.max_memory_allocated()


def test_a_tensor_may_give_up_its_storage() -> None:
    """``set_`` without a source leaves no bytes, and the tensor can grow again."""
    before = torch.cuda.memory_allocated()
    tensor = torch.ones(MIB, device="cuda")

    assert (0,) == tensor.set_().shape  # type: ignore[call-overload]  # missing in the stubs
    assert before == torch.cuda.memory_allocated()
    tensor.resize_(1024)
    assert before + 4096 == torch.cuda.memory_allocated()


def test_a_resize_needs_old_and_new_at_once() -> None:
    """resize_ takes the new block before it gives the old one back."""
    tensor = _mib(2)
    torch.cuda.reset_peak_memory_stats()

    tensor.resize_(4 * MIB)

    assert 4 * MIB == torch.cuda.memory_allocated()
    assert 6 * MIB == torch.cuda.max_memory_allocated()


def test_a_cast_copies_on_the_card() -> None:
    """half() holds old and new until the old one goes."""
    tensor = torch.zeros(MIB, device="cuda")
    torch.cuda.reset_peak_memory_stats()

    tensor = tensor.half()

    assert 6 * MIB == torch.cuda.max_memory_allocated()
    assert 2 * MIB == tensor.untyped_storage().nbytes()


def test_a_converting_upload_takes_only_the_result() -> None:
    """Types are converted on the host before the copy."""
    torch.ones(MIB).to("cuda", torch.float16)

    assert 2 * MIB == torch.cuda.max_memory_allocated()


def test_a_strided_download_is_made_contiguous_on_the_card() -> None:
    """A copy to the host of what is not dense takes a buffer on the card."""
    tensor = torch.zeros(2, MIB, device="cuda")[:, ::2]
    torch.cuda.reset_peak_memory_stats()

    tensor.cpu()

    assert 12 * MIB == torch.cuda.max_memory_allocated()


def test_empty_tensors_take_nothing() -> None:
    """A tensor without elements reaches no allocator."""
    torch.zeros(0, device="cuda")

    assert 0 == torch.cuda.memory_stats()["allocation.all.allocated"]


def test_running_out_raises_torchs_error(card: SimulatedCard) -> None:
    """Class, single argument and text are those of torch's allocator."""
    kept = _mib(40)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        _mib(30)

    error = caught.value
    assert torch.OutOfMemoryError is type(error)
    assert (str(error),) == error.args
    assert error.__cause__ is None
    assert error.__context__ is None
    assert str(error).startswith(
        "CUDA out of memory. Tried to allocate 30.00 MiB. GPU 0 has a total capacity of "
        "64.00 MiB of which 24.00 MiB is free. Including non-PyTorch memory, this "
        "process has 40.00 MiB memory in use. Of the allocated memory 40.00 MiB is "
        "allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated. If "
    )
    assert 1 == torch.cuda.memory_stats()["num_ooms"] == card.allocator.num_ooms
    assert kept.is_cuda


def test_an_oom_in_an_operator_keeps_no_operand() -> None:
    """While the error is handled, a temporary operand is already gone."""
    base = _mib(20)

    try:
        torch.cat([base + 1, base])
    except torch.OutOfMemoryError:
        during = torch.cuda.memory_allocated()

    assert 20 * MIB == during


def test_an_oom_leaves_an_in_place_target_alone() -> None:
    """A refused resize keeps size, values and bytes."""
    tensor = _mib(30)
    tensor.fill_(3)

    with pytest.raises(torch.OutOfMemoryError):
        _mib(50)

    assert 30 * MIB == tensor.numel()
    assert 3 == tensor[0].item()


def test_cached_blocks_are_given_back_before_failing() -> None:
    """The allocator flushes its cache and tries again."""
    a, b = _mib(30), _mib(30)
    del a, b

    c = _mib(60)

    assert 1 == torch.cuda.memory_stats()["num_alloc_retries"]
    assert 60 * MIB == torch.cuda.memory_reserved() == c.numel()


def test_free_memory_is_what_is_not_reserved() -> None:
    """mem_get_info counts cached blocks as taken, until empty_cache."""
    _mib(20)
    cached = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()

    assert (44 * MIB, 64 * MIB) == cached
    assert (64 * MIB, 64 * MIB) == torch.cuda.mem_get_info()
    if has("accelerator.get_memory_info"):
        assert (64 * MIB, 64 * MIB) == torch.accelerator.get_memory_info()


def test_torchs_own_fraction_limits_reserved_bytes() -> None:
    """set_per_process_memory_fraction caps, and the text says what is allowed."""
    torch.cuda.set_per_process_memory_fraction(0.5)

    with pytest.raises(torch.OutOfMemoryError, match=r"32.00 MiB allowed; "):
        _mib(33)

    assert 0.5 == torch.cuda.get_per_process_memory_fraction()
    assert 32 * MIB == _mib(32).numel()
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_cycle_is_freed_by_the_collector() -> None:
    """What only a reference cycle holds goes when the collector runs."""
    cycle: list[object] = [_mib(2)]
    cycle.append(cycle)
    gone = weakref.ref(cycle[0])
    del cycle
    before = torch.cuda.memory_allocated()
    gc.collect()

    assert 2 * MIB == before
    assert gone() is None
    assert 0 == torch.cuda.memory_allocated()


def test_a_storage_in_a_cycle_keeps_its_block() -> None:
    """``torch.save`` leaves cycles with the storages; tensors still hold the block."""
    kept = _mib(2)
    cycle: list[object] = [kept.untyped_storage()]
    cycle.append(cycle)
    del cycle
    gc.collect()

    assert 2 * MIB == torch.cuda.memory_allocated()
    del kept
    assert 0 == torch.cuda.memory_allocated()


def test_threads_share_the_card() -> None:
    """Allocations and releases from many threads add up."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                a = torch.ones(1000, device="cuda")
                b = a + a
                del a, b
        except BaseException as error:  # noqa: BLE001  # shown below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [] == errors
    assert 0 == torch.cuda.memory_allocated()


def test_streams_have_blocks_of_their_own(card: SimulatedCard) -> None:
    """A block freed on one stream does not serve another."""
    side = torch.cuda.Stream()
    _mib(2)
    with torch.cuda.stream(side):
        other = _mib(2)

    assert 2 == len(card.allocator.segments())
    assert 2 * MIB == other.numel()


def test_statistics_have_torchs_keys() -> None:
    """memory_stats has its 123 keys, and the summary can be printed."""
    _mib(1)

    assert 123 == len(torch.cuda.memory_stats())
    assert "CUDA OOMs: 0" in torch.cuda.memory_summary()
    assert "small" == torch.cuda.memory_snapshot()[0]["segment_type"]


def test_a_recorded_stream_keeps_a_block_active(card: SimulatedCard) -> None:
    """record_stream delays reuse until the stream's work is done."""
    card.allocator.events_pending = True
    tensor = _mib(2)
    tensor.record_stream(torch.cuda.Stream())
    del tensor
    stats = torch.cuda.memory_stats()

    assert 0 == stats["allocated_bytes.all.current"]
    assert 2 * MIB == stats["active_bytes.all.current"]


def test_the_first_product_takes_cublas_its_workspace(card: SimulatedCard) -> None:
    """8.125 MiB on compute capability 8, kept until it is cleared, and no more."""
    a = torch.ones(16, 16, device="cuda")
    before = torch.cuda.memory_allocated()

    results = [a @ a, a @ a]
    held = torch.cuda.memory_allocated() - before
    torch._C._cuda_clearCublasWorkspaces()

    assert 8_519_680 + 2 * 1024 == held
    assert before + 2 * 1024 == torch.cuda.memory_allocated()
    assert 2 == len(results)
    assert {} == card.workspaces
