"""PyTorch Lightning: ``Tuner.scale_batch_size`` and ``BatchSizeFinder``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytorch_lightning as lightning
import torch
from evidence import MIB, CountOoms, accepted_by
from pytorch_lightning.callbacks import BatchSizeFinder
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.memory import (
    garbage_collection_cuda,
    is_cuda_out_of_memory,
    is_cudnn_snafu,
    is_oom_error,
    is_out_of_cpu_memory,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem import OomInjector

pytest_plugins = ["pytester"]

#: What says "CUDA" beside "out of memory".
OF_CUDA = {"native", "legacy", "async", "driver", "address-space", "nccl", "triton"}

#: The number of steps at which a test gives up on a search that does not end.
MANY_STEPS = 20


class Model(lightning.LightningModule):  # type: ignore[misc]  # the library is not checked
    """A regression that holds ``sample_bytes`` of the card for each sample.

    Args:
        num_samples: How many there are.
        sample_bytes: What a step holds for each.
    """

    def __init__(self, num_samples: int, sample_bytes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))  # elementwise: cuBLAS takes nothing
        self.batch_size = 4
        self.sizes: list[int] = []
        self.num_samples = num_samples
        self.sample_bytes = sample_bytes

    def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
        """Note the batch's size, take the bytes, return the loss."""
        inputs = batch[0]
        self.sizes.append(len(inputs))
        if len(self.sizes) > MANY_STEPS:
            raise EndlessSearchError
        held = torch.empty(
            len(inputs) * self.sample_bytes, dtype=torch.uint8, device=self.device
        )
        loss: torch.Tensor = (inputs * self.weight - 1).square().mean()
        del held
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        """The samples in their order, in batches of the size under search."""
        inputs = torch.linspace(-1, 1, self.num_samples * 8).reshape(-1, 8)
        return DataLoader(TensorDataset(inputs), batch_size=self.batch_size)


class EndlessSearchError(Exception):
    """The search goes on and on."""


def _trainer(folder: Path, accelerator: str = "gpu", **options: Any) -> Any:
    return lightning.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("power", [4, 8, 16, 32, 64]),
        ("binsearch", [4, 8, 16, 32, 64, 48, 56, 60, 58, 59]),
    ],
)
def test_the_largest_batch_that_fits_is_found(
    tmp_path: Path, vram_budget: Callable[..., Any], mode: str, sizes: list[int]
) -> None:
    """One MiB a sample under 60 MiB: 58, for the small tensors take a segment of 2."""
    model = Model(num_samples=1000, sample_bytes=MIB)
    tuner = Tuner(_trainer(tmp_path))

    with vram_budget("60MiB"), CountOoms() as ooms:
        found = tuner.scale_batch_size(
            model, mode=mode, steps_per_trial=1, init_val=4, margin=0.0
        )

    assert ooms.num
    assert list(dict.fromkeys(model.sizes)) == sizes
    assert found == (32 if mode == "power" else 58)
    assert model.batch_size == found


def test_the_finder_trains_on_with_what_it_found(
    tmp_path: Path, vram_budget: Callable[..., Any]
) -> None:
    """``BatchSizeFinder`` in a fit: weights are those of the CPU at that size."""
    model = Model(num_samples=256, sample_bytes=MIB)
    finder = BatchSizeFinder(steps_per_trial=1, init_val=4)
    with vram_budget("60MiB"), CountOoms() as ooms:
        _trainer(tmp_path, callbacks=[finder]).fit(model)
    on_host = Model(num_samples=256, sample_bytes=0)
    on_host.batch_size = 32
    _trainer(tmp_path, "cpu").fit(on_host)

    assert ooms.num == 1
    assert finder.optimal_batch_size == 32
    assert model.sizes[-8:] == on_host.sizes == [32] * 8
    torch.testing.assert_close(model.weight.cpu(), on_host.weight)


def test_an_injected_oom_ends_the_doubling(
    tmp_path: Path, oom_injector: OomInjector
) -> None:
    """An OOM in the third trial's step leads back to the second's size."""
    model = Model(num_samples=1000, sample_bytes=2 * MIB)
    rule = oom_injector.arm("any:min=32MiB")

    found = Tuner(_trainer(tmp_path)).scale_batch_size(
        model, steps_per_trial=1, init_val=4
    )

    assert rule.num_failed == 1
    assert found == 8


def test_a_batch_larger_than_the_data_is_kept_though_it_fails(
    tmp_path: Path, vram_budget: Callable[..., Any]
) -> None:
    """A finding: an OOM at a size above the number of samples does not lower it.

    ``_adjust_batch_size`` gives the size back as it is where it is not below the
    number of samples, whether it is to grow or to shrink.
    """
    model = Model(num_samples=100, sample_bytes=MIB)

    with vram_budget("98MiB"), CountOoms() as ooms:
        found = Tuner(_trainer(tmp_path)).scale_batch_size(
            model, steps_per_trial=1, init_val=4
        )

    assert ooms.num == 1
    assert model.sizes == [4, 8, 16, 32, 64, 100]
    assert found == 128  # 64 is what fits


def test_a_binary_search_above_the_data_never_ends(
    tmp_path: Path, vram_budget: Callable[..., Any]
) -> None:
    """A finding: the same in ``binsearch`` mode tries the same size for ever."""
    model = Model(num_samples=100, sample_bytes=MIB)

    with (
        vram_budget("98MiB"),
        CountOoms() as ooms,
        pytest.raises(EndlessSearchError),
    ):
        Tuner(_trainer(tmp_path)).scale_batch_size(
            model, mode="binsearch", steps_per_trial=1, init_val=4
        )

    assert model.sizes[5:] == [100] * (MANY_STEPS - 4)
    assert ooms.num == MANY_STEPS - 5


@pytest.mark.parametrize(
    ("detector", "accepted"),
    [
        (is_cuda_out_of_memory, OF_CUDA),
        (is_cudnn_snafu, {"cudnn-unsupported"}),
        (is_out_of_cpu_memory, {"host"}),
        (is_oom_error, OF_CUDA | {"cudnn-unsupported", "host"}),
    ],
)
def test_its_detectors(
    detector: Callable[[BaseException], bool], accepted: set[str]
) -> None:
    """It asks for "CUDA" beside "out of memory", so ROCm, XPU and MPS are not known.

    Nor are cuBLAS, NVML, CuPy and cuDNN's failed allocation. The async allocator is by
    chance: its text says "Free (according to CUDA)".
    """
    assert accepted_by(detector) == accepted


def test_its_cleaning_gives_the_cache_back() -> None:
    """``garbage_collection_cuda`` leaves nothing reserved."""
    held = torch.ones(MIB, device="cuda")
    del held
    assert torch.cuda.memory_reserved()
    garbage_collection_cuda()
    assert torch.cuda.memory_reserved() == 0


SEARCH = """
import pytest
from test_lightning import MIB, Model, Tuner, _trainer


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_it(mode, tmp_path):
    model = Model(num_samples=1000, sample_bytes=MIB)
    Tuner(_trainer(tmp_path)).scale_batch_size(
        model, mode=mode, steps_per_trial=1, init_val=4, margin=0.0
    )
"""


def test_a_search_that_ran_out_is_shown(pytester: pytest.Pytester) -> None:
    """The size at which memory ran out first, and the size in the end."""
    pytester.makepyfile(SEARCH)
    pytester.syspathinsert(Path(__file__).parent)

    result = pytester.runpytest("--gpu-card=T4", "--gpu-budget=60MiB")

    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines_random(
        [
            "*test_it[[]power]: the batch of Model was shrunk from 64 to 32, as *",
            "*test_it[[]binsearch]: the batch of Model was shrunk from 64 to 58, as *",
        ]
    )
