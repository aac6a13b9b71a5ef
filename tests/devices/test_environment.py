"""What the environment says of cards and allocator holds for simulated ones too."""

from __future__ import annotations

import pytest
import torch
from versions import since

from pytest_gpumem.allocator.config import AllocatorConfig
from pytest_gpumem.allocator.versions import installed_version
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import AllocatorSettingError

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("variable", installed_version().variables)
def test_allocator_settings_are_honoured(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Either variable; the snapshot shows them; an explicit configuration wins."""
    monkeypatch.setenv(variable, "max_split_size_mb:64")
    with simulated_device("T4"):
        held = torch.zeros(1, device="cuda")
        settings = torch.cuda.memory._snapshot()["allocator_settings"]
    with simulated_device("T4", config=AllocatorConfig()) as machine:
        plain = machine.cards[0].allocator.config

    assert held.numel()
    assert "max_split_size_mb:64" == settings["PYTORCH_CUDA_ALLOC_CONF"]
    assert 64 * 2**20 == settings["max_split_size"]
    assert AllocatorConfig(version=installed_version()) == plain


@since(2, 10, "PYTORCH_ALLOC_CONF is not read")
def test_the_newer_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTORCH_ALLOC_CONF, where both are set."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:32")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    with simulated_device("T4") as machine:
        assert 32 * 2**20 == machine.cards[0].allocator.config.max_split_size


def test_settings_that_make_no_sense_are_refused(
    monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester
) -> None:
    """By an error that names the variable; in pytest exit 4 before any test."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split:1")
    with (
        pytest.raises(AllocatorSettingError, match=r"PYTORCH_CUDA_ALLOC_CONF='max_spl"),
        simulated_device("T4"),
    ):
        pass
    pytester.makepyfile("def test_it():\n    pass")
    result = pytester.runpytest("--gpu-backend=simulated")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*PYTORCH_CUDA_ALLOC_CONF='max_split:1'*"])


def test_torch_may_not_watch_kernels_that_no_card_runs(
    monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester
) -> None:
    """Exit 4 before any test: torch turns the sanitizer on by any value, even empty."""
    monkeypatch.setenv("TORCH_CUDA_SANITIZER", "")
    pytester.makepyfile("def test_it():\n    pass")
    result = pytester.runpytest("--gpu-backend=simulated")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(
        ["*TORCH_CUDA_SANITIZER is in the environment*unset it*"]
    )


def test_an_oom_comes_before_random_numbers_are_drawn() -> None:
    """What could not be allocated has not moved the generator."""
    with simulated_device("64MiB"):
        source = torch.ones(8 * 2**20, device="cuda")
        state = torch.cuda.get_rng_state()
        with pytest.raises(torch.OutOfMemoryError):
            torch.nn.functional.dropout(source, 0.5)
        with pytest.raises(torch.OutOfMemoryError):
            torch.rand_like(source.expand(2, -1))

        assert torch.equal(state, torch.cuda.get_rng_state())


def test_an_oom_comes_before_running_statistics_change() -> None:
    """Batch normalisation whose output found no room has seen no batch."""
    with simulated_device("64MiB"):
        layer = torch.nn.BatchNorm1d(8).cuda()
        source = torch.ones(2**20, 8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            layer(source)

        assert layer.running_mean is not None
        assert 0 == layer.running_mean.abs().sum().item()
