"""One conformance suite for every device: simulated, and real where there is one.

The adapter for real cards is also run over the simulated ``torch.cuda``, since it
uses nothing but torch's own functions.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from versions import has

from pytest_gpumem.cards import find_card
from pytest_gpumem.devices import Device, Tracker
from pytest_gpumem.devices.cuda import CudaDevice
from pytest_gpumem.devices.fractions import fraction_for
from pytest_gpumem.devices.simulated.device import SimulatedDevice
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import BudgetError

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20


@pytest.fixture(
    params=[
        "simulated",
        "cuda over simulated",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Each kind of device; budgets are lifted afterwards."""
    if request.param == "cuda":
        real = CudaDevice()
        real.empty_cache()
        yield real
        real.set_budget(0, None)
        return
    # The adapter finds a block by its address; where values are computed, a simulated
    # tensor's address is the host's.
    values = "computed" if request.param == "simulated" else "none"
    with simulated_device(find_card("512MiB,cc=8.0"), values=values) as machine:
        device: Device = (
            SimulatedDevice(machine) if request.param == "simulated" else CudaDevice()
        )
        yield device
        device.set_budget(0, None)


def _mib(count: int) -> torch.Tensor:
    return torch.zeros(count * MIB, dtype=torch.uint8, device="cuda")


def test_it_keeps_the_protocol(device: Device) -> None:
    """Every device has the protocol's verbs."""
    assert isinstance(device, Device)
    assert device.device_count >= 1
    assert device.name(0) == torch.cuda.get_device_name(0)


def test_failed_requests_are_observed(device: Device) -> None:
    """With card and bytes, in the thread that asks; not after the block."""
    seen: list[tuple[int, int, int]] = []

    def observe(index: int, nbytes: int) -> None:
        allocated = device.memory_stats(0)["allocated_bytes.all.current"]
        seen.append((index, nbytes, allocated))

    kept = _mib(30)
    before = torch.cuda.memory_allocated()
    with device.observing_ooms(observe):
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2**50, dtype=torch.uint8, device="cuda")
        _ = _mib(1)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(2**50, dtype=torch.uint8, device="cuda")

    assert [(0, 2**50, before)] == seen
    assert device.holds(kept.untyped_storage(), 0)
    assert not device.holds(torch.zeros(1).untyped_storage(), 0)


def test_a_tracker_sees_the_peak_and_the_end(device: Device) -> None:
    """Peak, start and end are the block's own; torch's reset does not hide a peak."""
    kept = _mib(30)
    tracker = device.open_tracker(0)
    passing = _mib(50)
    del passing
    torch.cuda.reset_peak_memory_stats()

    figures = tracker.close()

    start = figures.start_allocated_bytes
    assert start >= kept.numel()
    assert start + 50 * MIB == figures.peak_allocated_bytes
    assert start == figures.end_allocated_bytes == figures.end_active_bytes
    assert kept.numel() <= figures.end_requested_bytes <= start
    assert figures.peak_reserved_bytes >= figures.peak_allocated_bytes


def _what_user_code_reads(device: Device, *, is_tracked: bool) -> list[dict[str, int]]:
    """Run a program, with trackers that begin and end in its middle or without."""
    device.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    read: list[dict[str, int]] = []

    def look() -> None:
        stats = torch.cuda.memory_stats()
        read.append(
            {
                name: value
                for name, value in stats.items()
                if name.endswith((".peak", ".current"))
            }
        )

    def tracker() -> list[Tracker]:
        return [device.open_tracker(0)] if is_tracked else []

    kept, passing = _mib(10), _mib(50)
    del passing
    outer = tracker()
    look()
    inner = tracker()
    passing = _mib(20)
    del passing
    look()
    figures = [each.close() for each in inner]
    look()
    torch.cuda.reset_peak_memory_stats()
    look()
    passing = _mib(30)
    del passing
    figures += [each.close() for each in outer]
    look()
    torch.cuda.reset_peak_memory_stats()
    look()
    assert all(each.peak_allocated_bytes < kept.numel() + 50 * MIB for each in figures)
    return read


def test_trackers_change_no_figure_of_user_code(device: Device) -> None:
    """It reads its own peaks: before, beside and after trackers, and after resets."""
    alone = _what_user_code_reads(device, is_tracked=False)
    functions = torch._C._cuda_memoryStats, torch._C._cuda_resetPeakMemoryStats

    tracked = _what_user_code_reads(device, is_tracked=True)

    assert alone == tracked
    assert functions == (
        torch._C._cuda_memoryStats,
        torch._C._cuda_resetPeakMemoryStats,
    )


def test_what_user_code_reads_outlasts_the_tracker(device: Device) -> None:
    """Until the device is done with, and torch's functions are its own."""
    functions = torch._C._cuda_memoryStats
    kept, passing = _mib(1), _mib(50)
    del passing
    peak = torch.cuda.max_memory_allocated()

    device.open_tracker(0).close()
    after = torch.cuda.max_memory_allocated()
    device.restore()

    assert peak == after
    assert functions == torch._C._cuda_memoryStats
    assert kept.is_cuda


def test_a_card_has_a_context_once_it_was_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A build with CUDA is not asked for it where there is no driver, and no card."""

    def driver(index: int) -> bool:
        raise RuntimeError(
            "hasPrimaryContext expects a valid device index, but got "
            f"device_index={index}"
        )

    name = "_cuda_hasPrimaryContext"
    monkeypatch.setattr(torch._C, name, driver, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert 0 == CudaDevice().counted(0).process_bytes
    monkeypatch.undo()

    with simulated_device("512MiB,cc=8.0"):
        asked = getattr(torch._C, name)

        assert not asked(0)
        torch.zeros(1, device="cuda")
        assert asked(0)
        with pytest.raises(RuntimeError, match="but got device_index=1"):
            asked(1)


def test_trackers_nest(device: Device) -> None:
    """An inner tracker's peak is the inner block's; the outer one sees both."""
    outer = device.open_tracker(0)
    first = _mib(40)
    del first
    inner = device.open_tracker(0)
    _mib(10)
    inside = inner.close()
    around = outer.close()

    start = around.start_allocated_bytes
    assert start + 10 * MIB == inside.peak_allocated_bytes
    assert start + 40 * MIB == around.peak_allocated_bytes


def test_a_budget_caps_and_is_told_everywhere(device: Device) -> None:
    """Free memory is at most what the budget leaves; the total stays the card's."""
    _free, total = device.mem_get_info(0)
    assert total == device.total_bytes(0)
    device.empty_cache()
    held = torch.cuda.memory_reserved(0)
    device.set_budget(0, held + 100 * MIB)

    told = [
        device.mem_get_info(0),
        torch.cuda.mem_get_info(0),
    ]
    if has("accelerator.get_memory_info"):
        told.append(torch.accelerator.get_memory_info(0))
    kept = _mib(60)
    left = torch.cuda.mem_get_info(0)[0]
    with pytest.raises(torch.OutOfMemoryError, match="allowed; "):
        _mib(60)

    assert {(100 * MIB, total)} == set(told)
    assert 40 * MIB == left
    assert kept.is_cuda
    assert held + 100 * MIB == device.budget(0)


def test_a_budget_is_inclusive(device: Device) -> None:
    """Reserving exactly the budget passes, one segment more does not."""
    device.empty_cache()
    device.set_budget(0, torch.cuda.memory_reserved(0) + 64 * MIB)

    exact = _mib(64)

    assert 64 * MIB == exact.numel()
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1, device="cuda")


def test_users_own_fraction_cannot_lift_a_budget(device: Device) -> None:
    """The smaller of budget and fraction holds, and both come back as they were."""
    device.empty_cache()
    device.set_budget(0, torch.cuda.memory_reserved(0) + 64 * MIB)

    torch.cuda.set_per_process_memory_fraction(1.0)
    with pytest.raises(torch.OutOfMemoryError):
        _mib(100)
    device.set_budget(0, None)

    assert 100 * MIB == _mib(100).numel()
    assert device.budget(0) is None


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_without_room_is_refused(device: Device, budget: int) -> None:
    """Zero and less leave nothing to test with."""
    with pytest.raises(BudgetError, match="accepted are 1 to"):
        device.set_budget(0, budget)


def test_a_budget_above_the_card_is_refused(device: Device) -> None:
    """One byte more than the card has is an error; the whole card is not."""
    _free, total = device.mem_get_info(0)

    device.set_budget(0, total)
    with pytest.raises(BudgetError, match=f"budget of {total + 1} bytes"):
        device.set_budget(0, total + 1)


def test_a_block_has_the_allocators_size(device: Device) -> None:
    """The bytes under a storage are rounded to the allocator's blocks."""
    tensor = torch.zeros(1000, dtype=torch.uint8, device="cuda")

    assert 1024 == device.block_bytes(tensor.untyped_storage())


def test_a_block_has_an_address(device: Device) -> None:
    """A view's is its base's; what is on the host has none."""
    one, other = _mib(1), _mib(1)
    storages = [each.untyped_storage() for each in (one, other, one[8:])]

    first, second, third = (device.block_address(each) for each in storages)

    assert first == third != second
    assert None is device.block_address(torch.zeros(1).untyped_storage())


def test_requests_are_counted(device: Device) -> None:
    """The number of requests grows with every allocation, and only then."""
    before = device.num_requests
    tensor = _mib(1)
    after = device.num_requests
    tensor.add_(1)

    assert before + 1 == after == device.num_requests
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(2**50, dtype=torch.uint8, device="cuda")
    assert after + 1 == device.num_requests


def test_counts_survive_a_reset_of_torchs(device: Device) -> None:
    """A test that resets the accumulated statistics has used the card all the same."""
    tracker = device.open_tracker(0)
    before = device.num_requests
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(2**50, dtype=torch.uint8, device="cuda")
    torch.cuda.reset_accumulated_memory_stats()
    again = device.num_requests
    if has("accelerator.reset_accumulated_memory_stats"):
        torch.accelerator.reset_accumulated_memory_stats()
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(2**50, dtype=torch.uint8, device="cuda")

    figures = tracker.close()

    assert before + 1 == again
    assert before + 2 == device.num_requests
    assert (2, 2) == (figures.num_ooms, figures.num_alloc_retries)


def test_nvml_is_capped_whenever_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the budget or after it; with the budget the cap is gone."""
    pytest.importorskip("pynvml")
    with simulated_device(find_card("512MiB,cc=8.0"), values="none"):
        device = CudaDevice()
        device.set_budget(0, 64 * MIB)
        monkeypatch.delitem(sys.modules, "pynvml")
        device.set_budget(0, None)
        device.set_budget(0, 64 * MIB)
        module: Any = importlib.import_module("pynvml")
        capped = module.nvmlDeviceGetMemoryInfo
        device.set_budget(0, None)

        assert capped.__wrapped__ is module.nvmlDeviceGetMemoryInfo
        assert not hasattr(module.nvmlDeviceGetMemoryInfo, "__wrapped__")


def test_the_largest_fraction_below_a_limit_is_exact() -> None:
    """Turning bytes into a fraction and back gives the same bytes."""
    for total in (11996954624, 15835594752, 85031714816, 2**30 + 7):
        for limit in (1, 512, 2**20 + 1, total // 3, total - 1, total):
            assert limit == int(fraction_for(limit, total) * total)


def test_refusing_raises_for_the_chosen_allocation() -> None:
    """The asked callable fails one request by its bytes; others are served."""
    asked: list[tuple[int, int]] = []

    def fails(index: int, nbytes: int) -> bool:
        asked.append((index, nbytes))
        return nbytes == 2 * MIB

    with (
        simulated_device(find_card("512MiB,cc=8.0")) as machine,
        SimulatedDevice(machine).failing(fails),
    ):
        kept: list[Any] = [_mib(1)]
        with pytest.raises(
            torch.OutOfMemoryError, match=r"Tried to allocate 20\.00 MiB"
        ):
            _mib(2)
        kept.append(_mib(3))

    assert [(0, MIB), (0, 2 * MIB), (0, 3 * MIB)] == asked
