"""Cards that share the host's memory: GB10 and the Jetson modules."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_gpumem import host_memory, vram_budget
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
pytest_plugins = ["pytester"]
#: How far pages that Python takes and gives back meanwhile can move a figure.
NOISE = 16 * MIB
only_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the system does not tell the pages"
)


def _free() -> int:
    return torch.cuda.mem_get_info()[0]


@only_linux
def test_what_the_host_holds_is_not_free_for_the_card() -> None:
    """A tensor of the host takes its bytes of the one memory; then the card's copy."""
    # The copy would take free pages of the heap, which the process holds already.
    host_memory.give_back_free_heap()
    with simulated_device("Jetson-Orin-Nano-8GB,ctx=0"):
        assert torch.cuda.get_device_properties(0).is_integrated == 1
        before = _free()
        # A mapping of its own: the heap may keep what is freed.
        host = torch.frombuffer(mmap(-1, 100 * MIB), dtype=torch.uint8).fill_(1)
        with_host = _free()
        card = host.to("cuda")
        with_both = _free()
        del host
        only_card = _free()

    assert 100 * MIB == card.numel()
    assert 100 * MIB == pytest.approx(before - with_host, abs=NOISE)
    assert 100 * MIB == pytest.approx(with_host - with_both, abs=NOISE)
    assert 100 * MIB == pytest.approx(only_card - with_both, abs=NOISE)


@only_linux
def test_values_that_a_thread_is_freeing_are_not_the_hosts() -> None:
    """For other threads, until the thread looks itself."""
    kept = mmap(-1, 100 * MIB)
    torch.frombuffer(kept, dtype=torch.uint8).fill_(1)
    with simulated_device("T4") as machine:
        before = machine.host_bytes()
        machine.note_leaving(100 * MIB)
        with ThreadPoolExecutor() as pool:
            meanwhile = pool.submit(machine.host_bytes).result()
        after = machine.host_bytes()

    assert 100 * MIB == pytest.approx(before - meanwhile, abs=NOISE)
    assert after == pytest.approx(before, abs=NOISE)


@only_linux
def test_a_model_that_is_copied_from_the_host_needs_its_bytes_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy runs out of memory, although the card alone would have room."""
    held = [0]
    monkeypatch.setattr(
        "pytest_gpumem.devices.simulated.machine.anonymous_bytes", lambda: held[0]
    )
    with simulated_device("Jetson-Orin-Nano-8GB,ctx=0", values="none"):
        held[0] = 5 * 2**30  # the model on the host
        with pytest.raises(torch.OutOfMemoryError, match=r"of which 2\.44 GiB is free"):
            torch.empty(5 * 2**30, dtype=torch.uint8, device="cuda")
        held[0] = 0  # loaded to the card directly
        loaded = torch.empty(5 * 2**30, dtype=torch.uint8, device="cuda")

        assert loaded.is_cuda


def test_the_values_of_a_cards_tensors_are_no_bytes_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are in the host's memory only because the card is simulated."""
    monkeypatch.setattr(
        "pytest_gpumem.devices.simulated.machine.anonymous_bytes", lambda: 300 * MIB
    )
    with simulated_device("GB10,ctx=0") as machine:
        total = torch.cuda.mem_get_info()[1]
        kept = torch.ones(200 * MIB, dtype=torch.uint8, device="cuda")

        assert 100 * MIB == machine.host_bytes()
        assert total - 300 * MIB == _free()
        assert kept.is_cuda


def test_the_hosts_part_can_be_given() -> None:
    """The figures are then the same in each run, as is the text of an OOM."""
    with simulated_device("GB10,ctx=0,host=100GiB", values="none"):
        free, total = torch.cuda.mem_get_info()
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"GPU 0 has a total capacity of 121\.63 GiB of which 21\.63 GiB is free",
        ):
            torch.empty(22 * 2**30, dtype=torch.uint8, device="cuda")

    assert total - 100 * 2**30 == free


def test_a_budget_holds_there_too() -> None:
    """It caps what PyTorch reserves, and the free bytes that CUDA reports."""
    with simulated_device("GB10"), vram_budget("64MiB"):
        assert 64 * MIB == _free()
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(65 * MIB, dtype=torch.uint8, device="cuda")
        assert torch.empty(64 * MIB, dtype=torch.uint8, device="cuda").is_cuda


def test_the_text_of_an_oom_on_a_jetson_orin_lists_no_processes() -> None:
    """PyTorch asks NVML for them, which knows none there."""
    with (
        simulated_device("Jetson-Orin-NX-16GB,host=0", values="none"),
        pytest.raises(torch.OutOfMemoryError) as caught,
    ):
        torch.empty(2**35, dtype=torch.uint8, device="cuda")

    assert "is free. Of the allocated memory" in str(caught.value)


def test_a_run_may_be_on_one(pytester: pytest.Pytester) -> None:
    """``--gpu-card=GB10`` and a budget; the report counts the process's bytes."""
    pytester.makepyfile(
        """
        import torch

        def test_it():
            assert torch.cuda.get_device_name() == "NVIDIA GB10"
            assert torch.cuda.get_device_properties(0).is_integrated
            assert torch.cuda.mem_get_info()[0] == 2**30
            torch.ones(2**20, device="cuda")
        """
    )
    result = pytester.runpytest("--gpu-card=GB10,host=20GiB", "--gpu-budget=1GiB")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpumem: *NVIDIA GB10 121.63 GiB cc 12.1*"])


def test_a_system_without_that_file_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside Linux the host's bytes are 0."""
    monkeypatch.setattr(host_memory, "_STATUS", str(tmp_path / "none"))

    assert host_memory.anonymous_bytes() == 0
