"""Which errors accelerate and transformers' Trainer take for an OOM, flavour by flavour."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size
from packaging.version import Version
from torch import nn
from transformers import Trainer, TrainingArguments

from pytest_gpumem import OomInjector, vram_budget
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.rules.rule import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 2**20
#: What accelerate knows: the texts of CUDA's, ROCm's, XPU's and MPS's allocators, one
#: of cuDNN's and the host's. It misses cudaMallocAsync, the driver, cuBLAS, cuDNN's
#: failed allocation, NVML, and what other libraries of NVIDIA's say.
ACCEPTED = {"native", "legacy", "hip", "xpu", "cudnn-unsupported", "host"}
if Version(version("accelerate")) >= Version("1.15"):
    ACCEPTED.add("mps")


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        yield


class Net(nn.Module):
    """A regression that holds 1 MiB of the card for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.sizes: list[int] = []

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Note the batch's size and return the loss."""
        self.sizes.append(len(inputs))
        held = torch.empty(
            len(inputs) * MIB, dtype=torch.uint8, device=self.weight.device
        )
        outputs = (inputs * self.weight).sum(1)
        del held
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


SAMPLES = [
    {"inputs": torch.full((4,), each / 64), "labels": torch.tensor(each / 32)}
    for each in range(64)
]


def _train(folder: Path, *, batch_size: int = 16, on_card: bool = True) -> Net:
    net = Net()
    settings = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not on_card,
        per_device_train_batch_size=batch_size,
        auto_find_batch_size=True,
        num_train_epochs=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=net, args=settings, train_dataset=SAMPLES).train()
    return net


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_accelerates_detector(flavour: str) -> None:
    """By itself, on the very error."""
    with (
        OomInjector(f"any:flavour={flavour}"),
        pytest.raises((RuntimeError, MemoryError)) as caught,
    ):
        torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")

    assert should_reduce_batch_size(caught.value) == (flavour in ACCEPTED)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_decorator_falls_back_on_what_is_accepted(flavour: str) -> None:
    """Nine tenths of the batch, and the other errors reach the caller."""
    tried = []

    @find_executable_batch_size(starting_batch_size=100)  # type: ignore[untyped-decorator]  # accelerate's
    def run(batch_size: int) -> torch.Tensor:
        tried.append(batch_size)
        return torch.arange(batch_size, device="cuda").sum()

    with OomInjector(f"any:flavour={flavour}") as injector:
        if flavour in ACCEPTED:
            assert int(run()) == sum(range(90))
        else:
            with pytest.raises((RuntimeError, MemoryError)):
                run()

    assert injector.num_injected == 1
    assert tried == ([100, 90] if flavour in ACCEPTED else [100])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_trainer_falls_back_on_what_is_accepted(
    tmp_path: Path, flavour: str
) -> None:
    """The same through ``auto_find_batch_size``."""
    with OomInjector(f"forward:min=1MiB,flavour={flavour}") as injector:
        if flavour in ACCEPTED:
            assert _train(tmp_path).sizes == [16, 14, 14, 14, 14, 8]
        else:
            with pytest.raises((RuntimeError, MemoryError)):
                _train(tmp_path)

    assert injector.num_injected == 1


def test_the_trainers_weights_under_a_budget_are_the_cpus(tmp_path: Path) -> None:
    """A batch of 14 fits under 16 MiB, and computes what the CPU does with 14."""
    with vram_budget("16MiB"):
        found = _train(tmp_path)
    num_ooms = torch.cuda.memory_stats()["num_ooms"]
    expected = _train(tmp_path, batch_size=14, on_card=False)

    assert num_ooms == 1
    assert found.sizes == [16, *expected.sizes]
    torch.testing.assert_close(found.weight.cpu(), expected.weight)


def test_the_trainer_starts_again_from_half_trained_weights(tmp_path: Path) -> None:
    """What it does today: an OOM in the third step keeps the first two steps' work.

    The steps are counted anew and all samples seen again, so the run has trained more
    than a run at that size would.
    """
    with OomInjector("forward:min=1MiB,nth=3") as injector:
        found = _train(tmp_path)
    expected = _train(tmp_path, batch_size=14, on_card=False)

    assert injector.num_injected == 1
    assert found.sizes == [16, 16, 16, *expected.sizes]
    assert not torch.allclose(found.weight.cpu(), expected.weight, rtol=0.05)
