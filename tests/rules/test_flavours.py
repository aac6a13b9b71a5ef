"""The errors of real machines: class, argument, text, and what they leave behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from pytest_gpumem import OomInjector
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments.flavours import COUNTED
from pytest_gpumem.rules.rule import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine

MIB = 2**20
BEGINNINGS = {
    "native": (
        torch.OutOfMemoryError,
        "CUDA out of memory. Tried to allocate 20.00 MiB",
    ),
    "legacy": (
        RuntimeError,
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has",
    ),
    "async": (
        torch.OutOfMemoryError,
        "Allocation on device 0 would exceed allowed memory. (out of memory)\n"
        "Currently allocated     : 1024.00 KiB\nRequested               : 3.00 MiB\n",
    ),
    "driver": (torch.AcceleratorError, "CUDA error: out of memory\n"),
    "cublas": (
        RuntimeError,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ),
    "cudnn": (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn-unsupported": (RuntimeError, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."),
    "cufft": (RuntimeError, "cuFFT error: CUFFT_ALLOC_FAILED"),
    "cusolver": (
        RuntimeError,
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate",
    ),
    "launch": (
        torch.AcceleratorError,
        "CUDA error: too many resources requested for launch\n",
    ),
    "nccl": (torch.distributed.DistBackendError, "NCCL error in: "),
    "triton": (RuntimeError, "Triton Error [CUDA]: out of memory"),
    "address-space": (RuntimeError, "CUDA driver error: out of memory"),
    "cupy": (
        MemoryError,
        "Out of memory allocating 3,145,728 bytes (allocated so far: 0 bytes).",
    ),
    "nvml": (RuntimeError, "NVML_SUCCESS == r INTERNAL ASSERT FAILED at"),
    "hip": (
        torch.OutOfMemoryError,
        "HIP out of memory. Tried to allocate 20.00 MiB. GPU",
    ),
    "xpu": (
        torch.OutOfMemoryError,
        "XPU out of memory. Tried to allocate 20.00 MiB. GPU",
    ),
    "mps": (RuntimeError, "MPS backend out of memory (MPS allocated: 2.00 MiB, other"),
    "host": (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 3145728 bytes.",
    ),
    "not-oom": (torch.AcceleratorError, "CUDA error: device-side assert triggered\n"),
}


@pytest.fixture
def machine() -> Iterator[SimulatedMachine]:
    """A card that holds 1 MiB."""
    with simulated_device("T4") as machine:
        held = torch.ones(MIB, dtype=torch.uint8, device="cuda")
        yield machine
        del held


def _fail(flavour: str) -> Exception:
    """Return what a request of 3 MiB raises."""
    with (
        OomInjector(f"any:flavour={flavour}") as injector,
        pytest.raises((RuntimeError, MemoryError)) as caught,
    ):
        torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    assert 1 == injector.num_injected
    return caught.value


def test_every_flavour_is_known_here() -> None:
    """A new flavour needs its class and text stated."""
    assert set(FLAVOURS) == set(BEGINNINGS)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_class_and_text_are_the_real_ones(flavour: str) -> None:
    """Exactly that class, one argument, and the text's beginning with the figures."""
    kind, beginning = BEGINNINGS[flavour]
    error = _fail(flavour)

    assert kind is type(error)
    assert 1 == len(error.args)
    assert str(error).startswith(beginning)
    assert error.__cause__ is None


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_card_is_left_as_by_the_real_one(
    machine: SimulatedMachine, flavour: str
) -> None:
    """What the caching allocator fails for is counted, observed and flushed first."""
    observed: list[object] = []
    torch._C._cuda_attach_out_of_memory_observer(lambda *each: observed.append(each))  # type: ignore[attr-defined]  # where torch's own users find it
    cached = torch.ones(30 * MIB, dtype=torch.uint8, device="cuda")
    del cached
    _fail(flavour)
    stats = machine.cards[0].memory_stats()

    counts = flavour in COUNTED
    assert int(counts) == stats["num_ooms"] == len(observed)
    is_flushed = stats["reserved_bytes.all.current"] == 2 * MIB
    assert is_flushed == (counts or flavour == "nvml")


@pytest.mark.usefixtures("machine")
def test_other_allocators_words_are_their_own() -> None:
    """ROCm names its own setting; XPU has neither processes nor that advice."""
    hip, xpu = str(_fail("hip")), str(_fail("xpu"))

    assert "PYTORCH_HIP_ALLOC_CONF=expandable_segments:True" in hip
    assert "CUDA_ALLOC_CONF" not in hip
    assert "this process has" not in xpu
    assert xpu.endswith(
        "Please use `empty_cache` to release all unoccupied cached memory."
    )


@pytest.mark.usefixtures("machine")
def test_several_rules_of_several_flavours_each_strike() -> None:
    """Each rule has its own count and its own error."""
    seen = []
    with OomInjector("any:nth=1,flavour=cublas", "any:nth=3,flavour=driver"):
        for _ in range(4):
            try:
                torch.empty(8, device="cuda")
            except RuntimeError as error:
                seen.append(str(error)[:17])
            else:
                seen.append("")

    assert ["CUDA error: CUBLA", "", "CUDA error: out o", ""] == seen


@pytest.mark.usefixtures("machine")
def test_a_rule_strikes_in_the_named_module() -> None:
    """Site matches the module's path and the parameter that is being moved."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    with (
        OomInjector("load:site=1.bias") as injector,
        pytest.raises(torch.OutOfMemoryError),
    ):
        model.cuda()
    moved = [name for name, each in model.named_parameters() if each.is_cuda]
    model.cuda()
    with (
        OomInjector("forward:site=1"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        model(torch.ones(1, 4, device="cuda"))

    assert 1 == injector.num_injected
    assert ["0.weight", "0.bias", "1.weight"] == moved
