"""Another process holds memory of a card."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.utils import get_max_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bert import Classifier, logits, save_layered

from pytest_gpumem import competing_process, simulated_device, vram_budget
from pytest_gpumem.errors import SizeError, TenantError
from pytest_gpumem.inheritance import present_tenants

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
GIB = 2**30


def _bytes(nbytes: int, card: int = 0) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{card}")


def test_a_tenant_takes_grows_and_leaves() -> None:
    """Free memory and the text of an OOM tell of it; it is gone afterwards."""
    with simulated_device("16GiB,cc=8.0"):
        with competing_process("10GiB") as tenant:
            held = torch.cuda.mem_get_info()[0]
            tenant.grow("4GiB")
            with pytest.raises(TenantError, match=r"only 2 GiB .* of 16 GiB are free"):
                tenant.grow("3GiB")
            with pytest.raises(
                torch.OutOfMemoryError,
                match=rf"Process {tenant.pid} has 14.00 GiB memory in use",
            ):
                _bytes(3 * GIB)
            tenant.leave()
            left = torch.cuda.mem_get_info()[0]
            tenant.grow(MIB)
        after = torch.cuda.mem_get_info()[0]

    assert (6 * GIB, 16 * GIB, 16 * GIB) == (held, left, after)


def test_a_tenant_goes_with_an_error() -> None:
    """Whatever happens in the block, the memory is free afterwards."""
    with simulated_device("16GiB,cc=8.0"):
        with pytest.raises(KeyError), competing_process("10GiB"):
            raise KeyError
        after = torch.cuda.mem_get_info()[0]

    assert 16 * GIB == after
    assert not present_tenants(), "what a child would find on the card"


def test_all_that_is_free_can_be_taken_and_no_byte_more() -> None:
    """Sizes are bytes, texts or shares of the card."""
    with simulated_device("16GiB,cc=8.0,ctx=300MiB"):
        free = torch.cuda.mem_get_info()[0]
        with competing_process(free):
            nothing = torch.cuda.mem_get_info()[0]
        with (
            pytest.raises(TenantError, match=f"takes {free + 1} "),
            competing_process(free + 1),
        ):
            pass
        with competing_process("50%") as half:
            assert 8 * GIB == half.nbytes
        with pytest.raises(SizeError), competing_process("a lot"):
            pass

        assert (0, free) == (nothing, torch.cuda.mem_get_info()[0])


@given(
    sizes=st.lists(st.integers(1, 300 * MIB), min_size=1, max_size=4),
    own=st.integers(1, 300 * MIB),
    context=st.sampled_from([0, 1, 200]),
    card=st.integers(0, 1),
)
@settings(max_examples=10)
def test_everybody_tells_one_story(
    sizes: list[int], own: int, context: int, card: int
) -> None:
    """The driver, NVML, the text of an OOM and accelerate agree to the byte."""
    pynvml: Any = pytest.importorskip("pynvml")
    name = "2GiB,cc=8.0" + (f",ctx={context}MiB" if context else "")
    with simulated_device(f"{name}*2"):
        blocks = [competing_process(size, device_index=card) for size in sizes]
        pids = [block.__enter__().pid for block in blocks]
        kept = _bytes(own, card)
        free, total = torch.cuda.mem_get_info(card)
        handle = pynvml.nvmlDeviceGetHandleByIndex(card)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        running = {
            each.pid: each.usedGpuMemory
            for each in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        }
        with pytest.raises(torch.OutOfMemoryError) as caught:
            _bytes(2 * GIB, card)
        elsewhere = torch.cuda.mem_get_info(1 - card)[0]
        planned = get_max_memory()  # puts a number on every card
        planned_for = [torch.cuda.mem_get_info(index)[0] for index in (0, 1)]
        for block in blocks:
            block.__exit__(None, None, None)
        after = torch.cuda.mem_get_info(card)[0]

    mine = running.pop(os.getpid())
    assert dict(zip(pids, sizes, strict=True)) == running
    assert (free, total, total - free) == (memory.free, memory.total, memory.used)
    assert total - free == mine + sum(running.values())
    assert mine == torch_reserved(kept) + context * MIB
    assert planned_for == [planned[0], planned[1]]
    assert after == planned_for[card] + sum(sizes)
    assert elsewhere == 2 * GIB - context * MIB
    text = str(caught.value)
    named = re.findall(r"Process (\d+) has ([\d.]+ \w+) memory in use\. ", text)
    assert named == [(str(pid), in_torch_words(each)) for pid, each in running.items()]
    assert f"this process has {in_torch_words(mine)} memory in use." in text
    assert f"of which {in_torch_words(free)} is free" in text


def torch_reserved(kept: torch.Tensor) -> int:
    """Return what the allocator takes for one tensor on an empty card.

    Source: ``get_allocation_size`` of ``CUDACachingAllocator.cpp``.
    """
    nbytes = kept.numel()
    if nbytes <= MIB:
        return 2 * MIB
    if nbytes < 10 * MIB:
        return 20 * MIB
    return -(-nbytes // (2 * MIB)) * 2 * MIB


def in_torch_words(nbytes: int) -> str:
    """Return bytes as ``format_size`` of ``CUDACachingAllocator.cpp`` does."""
    if nbytes <= 2**10:
        return f"{nbytes} bytes"
    if nbytes <= 2**20:
        return f"{nbytes / 2**10:.2f} KiB"
    if nbytes <= 2**30:
        return f"{nbytes / 2**20:.2f} MiB"
    return f"{nbytes / 2**30:.2f} GiB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a checkpoint."""
    folder = tmp_path_factory.mktemp("tenants")
    save_layered(folder)
    return folder


def test_auto_plans_around_a_tenant(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that fits an empty card ends partly on the host, and answers the same."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    wanted = logits(Classifier.from_pretrained(folder), "cpu")
    with simulated_device("16GiB,cc=8.0"):
        alone = Classifier.from_pretrained(folder, device_map="auto")
        whole = {each.device.type for each in alone.parameters()}
        del alone
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with competing_process(16 * GIB - 24 * MIB):
            spread = Classifier.from_pretrained(folder, device_map="auto")
            beside = logits(spread, "cuda")
            peak = torch.cuda.max_memory_reserved()
        places = {str(each) for each in spread.hf_device_map.values()}

    assert {"cuda"} == whole
    assert {"0", "cpu"} == places
    assert torch.equal(wanted, beside)
    assert 16 * MIB < peak <= 24 * MIB


def test_a_tenant_that_grows_breaks_what_was_planned(folder: Path) -> None:
    """What was free at the plan is not at the load; once it leaves, it is."""
    with simulated_device("256MiB,cc=8.0"), competing_process("100MiB") as tenant:
        free = torch.cuda.mem_get_info()[0]
        tenant.grow("150MiB")
        with pytest.raises(torch.OutOfMemoryError, match=f"Process {tenant.pid} has"):
            Classifier.from_pretrained(folder).to("cuda")
        tenant.leave()
        model = Classifier.from_pretrained(folder).to("cuda")

        assert 156 * MIB == free
        assert "cuda:0" == str(model.device)


def test_a_tenant_beside_a_budget_takes_of_what_is_free() -> None:
    """It is refused what the budget does not leave; a budget cares for no tenant."""
    with simulated_device("16GiB,cc=8.0"), vram_budget("4GiB"):
        with pytest.raises(TenantError, match=r"only 4 GiB .* are free"):
            competing_process("5GiB").__enter__()
        with competing_process("3GiB"):
            free = torch.cuda.mem_get_info()[0]

        assert 4 * GIB == free, "13 GiB of the card are left, 4 of them allowed"
