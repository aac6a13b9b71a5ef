"""NVML's answers agree with the simulated cards, and reach no driver."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from versions import COUNTS_BY_CUDA

from pytest_gpumem import vram_budget
from pytest_gpumem.cards import CARDS
from pytest_gpumem.devices.nvml import cap_free_memory, find_handle
from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.devices.simulated import machine
from pytest_gpumem.devices.simulated.device import SimulatedDevice
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


def test_a_slice_has_a_handle_of_its_own() -> None:
    """NVML counts GPUs; a GPU in MIG mode answers for all its slices together."""
    with simulated_device("A100-80GB:1g.10gb*2+A100-80GB:2g.20gb+A100-80GB") as here:
        cards = here.all_cards
        kept = [
            torch.zeros(20 * MIB, dtype=torch.uint8, device=f"cuda:{index}")
            for index in (0, 2)
        ]
        divided, plain = map(pynvml.nvmlDeviceGetHandleByIndex, range(2))
        slices = [
            pynvml.nvmlDeviceGetMigDeviceHandleByIndex(divided, index)
            for index in range(3)
        ]
        third = slices[2]
        contexts = [cards[number].context_bytes for number in (0, 2)]
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(divided)
        attributes = pynvml.nvmlDeviceGetAttributes_v2(third)
        used = pynvml.nvmlDeviceGetMemoryInfo(third).used

        assert 2 == pynvml.nvmlDeviceGetCount()
        assert [1, 1] == list(pynvml.nvmlDeviceGetMigMode(divided))
        assert [0, 0] == list(pynvml.nvmlDeviceGetMigMode(plain))
        assert (7, 0) == (
            pynvml.nvmlDeviceGetMaxMigDeviceCount(divided),
            pynvml.nvmlDeviceGetMaxMigDeviceCount(plain),
        )
        assert [each.uuid for each in cards[:3]] == [
            pynvml.nvmlDeviceGetUUID(each) for each in slices
        ]
        assert "NVIDIA A100-SXM4-80GB MIG 2g.20gb" == pynvml.nvmlDeviceGetName(third)
        assert "NVIDIA A100-SXM4-80GB" == pynvml.nvmlDeviceGetName(divided)
        assert third == pynvml.nvmlDeviceGetHandleByUUID(cards[2].uuid)
        assert divided == pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(third)
        assert (0, 1) == (
            pynvml.nvmlDeviceIsMigDeviceHandle(divided),
            pynvml.nvmlDeviceIsMigDeviceHandle(third),
        )
        assert [(7, 0), (8, 0), (3, 0)] == [
            (
                pynvml.nvmlDeviceGetGpuInstanceId(each),
                pynvml.nvmlDeviceGetComputeInstanceId(each),
            )
            for each in slices
        ]
        assert (28, 2, 2, 19968) == (
            attributes.multiprocessorCount,
            attributes.gpuInstanceSliceCount,
            attributes.computeInstanceSliceCount,
            attributes.memorySizeMB,
        )
        assert kept[1].numel() + contexts[1] == used
        assert pynvml.nvmlDeviceGetMemoryInfo(divided).used == used + (
            kept[0].numel() + contexts[0]
        )
        assert [(7, 0), (3, 0)] == [
            (each.gpuInstanceId, each.computeInstanceId) for each in processes
        ]
        with pytest.raises(pynvml.NVMLError, match="Not Supported"):
            pynvml.nvmlDeviceGetUtilizationRates(divided)
        with pytest.raises(pynvml.NVMLError, match="Not Found"):
            pynvml.nvmlDeviceGetMigDeviceHandleByIndex(divided, 3)
        with pytest.raises(pynvml.NVMLError, match="Invalid Argument"):
            pynvml.nvmlDeviceGetGpuInstanceId(divided)


@pytest.mark.skipif(
    not COUNTS_BY_CUDA,
    reason="torch counts the cards that NVML lists, not their slices",
)
def test_torch_finds_a_slice_in_nvml() -> None:
    """By the UUID that CUDA gives; the figures are the slice's."""
    with simulated_device("A100-80GB:1g.10gb*2"):
        kept = torch.zeros(20 * MIB, dtype=torch.uint8, device="cuda:1")
        handle = find_handle(pynvml, 1)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)

    assert 9728 * MIB == memory.total
    assert memory.used > kept.numel()


def test_a_card_without_memory_of_its_own_gives_none() -> None:
    """As GB10 and the Jetson modules do; CUDA's own answer is there."""
    with simulated_device("GB10,host=8GiB+Jetson-Orin-NX-16GB") as here:
        kept = torch.zeros(20 * MIB, dtype=torch.uint8, device="cuda:0")
        free, total = torch.cuda.mem_get_info(0)
        context = here.cards[0].context_bytes
        spark, orin = map(pynvml.nvmlDeviceGetHandleByIndex, range(2))
        (process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(spark)
        reading = SimulatedDevice(here).counted(0)

        for handle in (spark, orin):
            with pytest.raises(pynvml.NVMLError, match="Not Supported"):
                pynvml.nvmlDeviceGetMemoryInfo(handle)
        with pytest.raises(pynvml.NVMLError, match="Not Supported"):
            pynvml.nvmlDeviceGetComputeRunningProcesses(orin)
        assert "Orin (nvgpu)" == pynvml.nvmlDeviceGetName(orin)
        assert "Orin" == torch.cuda.get_device_name(1)
        assert total - 8 * 2**30 - kept.numel() - context == free
        assert (kept.numel() + context, None) == (process.usedGpuMemory, reading[1])
        assert process.usedGpuMemory == reading.process_bytes


def test_a_gpu_is_found_by_its_bus() -> None:
    """Where torch says that the card is, there NVML finds it."""
    properties: Any = torch.cuda.get_device_properties(1)
    name = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:00.0"
    handle = pynvml.nvmlDeviceGetHandleByPciBusId(name)

    assert 1 == pynvml.nvmlDeviceGetIndex(handle)
    assert "00000000:02:00.0" == pynvml.nvmlDeviceGetPciInfo(handle).busId
    with pytest.raises(pynvml.NVMLError, match="Not Found"):
        pynvml.nvmlDeviceGetHandleByPciBusId(b"00000000:09:00.0")


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


def test_functions_in_c_fill_the_callers_memory() -> None:
    """As nvitop calls them: it fetches each function, and passes addresses."""
    kept = torch.zeros(20 * MIB, dtype=torch.uint8, device="cuda:1")
    function = pynvml._nvmlGetFunctionPointer
    handle = pynvml.nvmlDeviceGetHandleByIndex(1)

    memory = pynvml.c_nvmlMemory_v2_t()
    assert function("nvmlDeviceGetMemoryInfo_v2")(handle, ctypes.byref(memory)) == 0
    assert memory.used == kept.numel() + CONTEXT
    count = ctypes.c_uint(7)
    assert function("nvmlDeviceGetCount_v2")(ctypes.byref(count)) == 0
    assert count.value == 2
    pci = pynvml.nvmlPciInfo_t()
    assert function("nvmlDeviceGetPciInfo_v3")(handle, ctypes.byref(pci)) == 0
    assert pci.busId == "00000000:02:00.0"
    words = (ctypes.c_ulonglong * 2)()
    affinity = function("nvmlDeviceGetCpuAffinity")
    assert affinity(handle, ctypes.c_uint(2), words) == 0
    assert list(words) == pynvml.nvmlDeviceGetCpuAffinity(handle, 2)
    major, minor = ctypes.c_int(), ctypes.c_int()
    capability = function("nvmlDeviceGetCudaComputeCapability")
    assert capability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
    assert (major.value, minor.value) == (7, 5)


def test_a_function_in_c_says_how_much_room_it_needs() -> None:
    """Of processes it first writes how many there are; a text that is too long is none."""
    kept = torch.zeros(20 * MIB, dtype=torch.uint8, device="cuda:1")
    function = pynvml._nvmlGetFunctionPointer
    handle = pynvml.nvmlDeviceGetHandleByIndex(1)

    running = function("nvmlDeviceGetComputeRunningProcesses_v3")
    count = ctypes.c_uint(0)
    assert (
        running(handle, ctypes.byref(count), None)
        == pynvml.NVML_ERROR_INSUFFICIENT_SIZE
    )
    assert count.value == 1
    processes = (pynvml.c_nvmlProcessInfo_v3_t * 1)()
    assert running(handle, ctypes.byref(count), processes) == 0
    assert processes[0].pid == os.getpid()
    assert processes[0].usedGpuMemory == kept.numel() + CONTEXT
    name = function("nvmlDeviceGetName")
    text = ctypes.create_string_buffer(8)
    assert name(handle, text, ctypes.c_uint(8)) == pynvml.NVML_ERROR_INSUFFICIENT_SIZE
    text = ctypes.create_string_buffer(9)
    assert name(handle, text, ctypes.c_uint(9)) == 0
    assert text.value == b"Tesla T4"
    program = pynvml.nvmlSystemGetProcessName(os.getpid())
    assert Path(program) == Path(sys.executable).resolve()


def test_functions_in_c_fail_with_nvmls_codes() -> None:
    """A feature that a card lacks, a card that is not there, a process that is not there."""
    function = pynvml._nvmlGetFunctionPointer
    value = ctypes.c_uint()

    sensor, unknown = ctypes.c_int(0), ctypes.c_uint(2**22 + 1)
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    assert function("nvmlDeviceGetTemperature")(
        handle, sensor, ctypes.byref(value)
    ) == (pynvml.NVML_ERROR_NOT_SUPPORTED)
    assert function("nvmlDeviceGetHandleByIndex_v2")(ctypes.c_uint(2), None) == (
        pynvml.NVML_ERROR_INVALID_ARGUMENT
    )
    text = ctypes.create_string_buffer(64)
    assert function("nvmlSystemGetProcessName")(unknown, text, ctypes.c_uint(64)) == (
        pynvml.NVML_ERROR_NOT_FOUND
    )
    assert function("nvmlErrorString")(3) == b"Not Supported"
    with pytest.raises(pynvml.NVMLError, match="Not Supported"):
        pynvml.nvmlUnitGetCount()
