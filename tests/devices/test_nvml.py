"""NVML's answers agree with the simulated cards, and reach no driver."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem import vram_budget
from pytest_gpumem.cards import CARDS
from pytest_gpumem.devices.nvml import cap_free_memory
from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.devices.simulated import machine
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated_nvml import SimulatedNvml
from pytest_gpumem.visibility import uuid_of

pynvml: Any = pytest.importorskip("pynvml")

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
#: What the context of a T4 takes.
CONTEXT = CARDS["T4"].context_bytes


@pytest.fixture(autouse=True)
def _cards() -> Iterator[None]:
    """Two simulated T4s, and NVML over them."""
    with simulated_device("T4*2"):
        nvml = SimulatedNvml(pynvml, machine.innermost_machine)
        nvml.install()
        yield
        nvml.remove()


def test_memory_is_the_cards() -> None:
    """Total, free and used follow what tensors hold, and a budget."""
    kept = torch.zeros(20 * MIB, dtype=torch.uint8, device="cuda:1")
    pynvml.nvmlInit()
    info = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(1))
    with vram_budget("1GiB", device_index=1):
        capped = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(1))

    free, total = torch.cuda.mem_get_info(1)
    assert (total, free, total - free) == (info.total, info.free, info.used)
    assert 20 * MIB + CONTEXT == info.used == kept.numel() + CONTEXT
    assert 1004 * MIB == capped.free


def test_cards_are_described() -> None:
    """Count, names, UUIDs and compute capability are the simulated ones."""
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid_of(1))

    assert 2 == pynvml.nvmlDeviceGetCount()
    assert 1 == pynvml.nvmlDeviceGetIndex(handle)
    assert "Tesla T4" == pynvml.nvmlDeviceGetName(handle)
    assert (7, 5) == pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    assert 0 == pynvml.nvmlDeviceGetUtilizationRates(handle).gpu


def test_the_process_is_listed_from_its_first_use_on() -> None:
    """Running processes are this one, with its context and what its tensors hold."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    before = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    kept = torch.zeros(20 * MIB, dtype=torch.uint8, device="cuda")
    (process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)

    assert [] == before
    assert os.getpid() == process.pid
    assert kept.numel() + CONTEXT == process.usedGpuMemory
    del kept
    torch.cuda.empty_cache()
    (process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert CONTEXT == process.usedGpuMemory


def test_every_core_is_near_every_card() -> None:
    """The cores are words of 64 bits; those beyond the machine's are not set."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    words = list(pynvml.nvmlDeviceGetCpuAffinity(handle, 3))
    cores = [bit for bit in range(192) if words[bit // 64] >> (bit % 64) & 1]

    assert list(range(min(os.cpu_count() or 1, 192))) == cores
    assert words == list(pynvml.nvmlDeviceGetCpuAffinityWithinScope(handle, 3, 0))
    with pytest.raises(pynvml.NVMLError, match="Invalid Argument"):
        pynvml.nvmlDeviceGetCpuAffinity(handle, 0)


def test_everything_else_is_not_supported() -> None:
    """A function that is not simulated raises NVML's own error."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    with pytest.raises(pynvml.NVMLError, match="Not Supported"):
        pynvml.nvmlDeviceGetTemperature(handle, 0)
    with pytest.raises(pynvml.NVMLError, match="Invalid Argument"):
        pynvml.nvmlDeviceGetHandleByIndex(5)
    with pytest.raises(pynvml.NVMLError, match="Not Found"):
        pynvml.nvmlDeviceGetHandleByUUID("GPU-1")


def test_a_real_cards_free_memory_can_be_capped() -> None:
    """Under a budget the module's own answer is lowered, and put back."""
    patches = PatchSet()
    handle = pynvml.nvmlDeviceGetHandleByIndex(1)
    original = pynvml.nvmlDeviceGetMemoryInfo

    cap_free_memory(pynvml, patches, lambda _i, _free, total: (7, total))
    capped = pynvml.nvmlDeviceGetMemoryInfo(handle)
    patches.restore()

    assert (7, capped.total - 7) == (capped.free, capped.used)
    assert original is pynvml.nvmlDeviceGetMemoryInfo
