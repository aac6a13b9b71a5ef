"""Programs that show cards: within a test, and as processes beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20


@pytest.fixture(autouse=True)
def used_bytes() -> Iterator[int]:
    """Hold a tensor; what CUDA says is used is what every reader must show."""
    kept = torch.zeros(256 * MIB, dtype=torch.uint8, device="cuda")
    free, total = torch.cuda.mem_get_info()
    yield total - free
    del kept


def _run(*words: str) -> str:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_gputil(used_bytes: int) -> None:
    """It reads what ``nvidia-smi`` prints."""
    gputil: Any = pytest.importorskip("GPUtil")

    (card,) = gputil.getGPUs()

    assert card.name == "Tesla T4"
    assert card.memoryUsed == used_bytes // MIB
    assert gputil.getAvailable(maxMemory=0.5) == [0]
    assert gputil.getAvailable(maxMemory=0.01) == []


def test_gpustat(used_bytes: int) -> None:
    """It asks pynvml, here and as a program without torch."""
    gpustat: Any = pytest.importorskip("gpustat")

    (card,) = gpustat.new_query()
    shown = json.loads(_run("-m", "gpustat", "--json"))["gpus"][0]

    assert card.memory_used == shown["memory.used"] == used_bytes // MIB
    assert [each["pid"] for each in card.processes] == [os.getpid()]
    assert [each["pid"] for each in shown["processes"]] == [os.getpid()]


def test_nvitop(used_bytes: int) -> None:
    """It calls NVML's functions in C, which it fetches through pynvml."""
    nvitop: Any = pytest.importorskip("nvitop")

    (card,) = nvitop.Device.all()
    (cuda,) = nvitop.CudaDevice.all()
    page = _run("-m", "nvitop", "--once", "--no-unicode")

    assert card.memory_used() == cuda.memory_used() == used_bytes
    assert card.memory_total() == torch.cuda.mem_get_info()[1]
    assert list(card.processes()) == [os.getpid()]
    assert nvitop.select_devices(format="index", min_free_memory="1GiB") == [0]
    assert f"{used_bytes / MIB:.1f}MiB" in page
    assert str(os.getpid()) in page


def test_py3nvml(used_bytes: int) -> None:
    """It has functions of its own for NVML."""
    py3nvml: Any = pytest.importorskip("py3nvml.py3nvml")
    nvidia_smi: Any = pytest.importorskip("py3nvml.nvidia_smi")

    py3nvml.nvmlInit()
    handle = py3nvml.nvmlDeviceGetHandleByIndex(0)
    (process,) = py3nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    code = (
        "import py3nvml.py3nvml as n; n.nvmlInit();"
        "print(n.nvmlDeviceGetMemoryInfo(n.nvmlDeviceGetHandleByIndex(0)).used)"
    )

    assert py3nvml.nvmlDeviceGetMemoryInfo(handle).used == used_bytes
    assert (process.pid, process.usedGpuMemory) == (os.getpid(), used_bytes)
    assert int(_run("-c", code)) == used_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of itself
        page = nvidia_smi.XmlDeviceQuery()
    assert f"<used>{used_bytes / MIB} MiB</used>" in page
