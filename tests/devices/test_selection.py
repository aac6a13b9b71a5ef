"""Which device a run uses, decided without torch."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import runpy
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.devices import accelerators, selection
from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.devices.selection import (
    Choice,
    NvidiaDriver,
    TorchBuild,
    choose,
    torch_build,
)
from pytest_gpumem.errors import DeviceUnavailableError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a CUDA build of torch and one card, to be changed."""
    monkeypatch.setattr(selection, "torch_build", lambda: TorchBuild("2.13.0", "13.0"))
    monkeypatch.setattr(
        selection, "ask_driver", lambda: NvidiaDriver(("GPU-1a",), "13.0")
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def test_a_usable_card_is_taken(machine: pytest.MonkeyPatch) -> None:
    """Auto means cuda where torch and the driver agree."""
    for listed in ("0", "0,7", "GPU-1", "MIG-GPU-1a/1/0"):
        machine.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert Choice("cuda", "a usable card") == choose("auto")

    assert Choice("cuda", "as requested") == choose("cuda")
    assert "simulated" == choose("simulated").kind


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("cpu build", "torch 2.13.0+cpu is built without CUDA"),
        ("no driver", "this machine has no NVIDIA driver"),
        ("no card", "the NVIDIA driver has no card"),
        ("hidden", "CUDA_VISIBLE_DEVICES hides every card"),
        ("another card", "CUDA_VISIBLE_DEVICES hides every card"),
        (
            "old driver",
            "the NVIDIA driver is for CUDA 12.8, torch 2.13.0 for CUDA 13.0",
        ),
    ],
)
def test_without_a_card_the_device_is_simulated(
    machine: pytest.MonkeyPatch, change: str, reason: str
) -> None:
    """Auto says why it simulates; cuda says why it cannot be had."""
    if change == "cpu build":
        machine.setattr(selection, "torch_build", lambda: TorchBuild("2.13.0+cpu"))
    elif change == "hidden":
        machine.setenv("CUDA_VISIBLE_DEVICES", "")
    elif change == "another card":
        machine.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    else:
        driver = {
            "no driver": None,
            "no card": NvidiaDriver((), "0.0"),
            "old driver": NvidiaDriver(("GPU-1a",), "12.8"),
        }[change]
        machine.setattr(selection, "ask_driver", lambda: driver)

    assert Choice("simulated", reason) == choose("auto")
    with pytest.raises(
        DeviceUnavailableError, match=f"but {reason.split('+', maxsplit=1)[0]}"
    ):
        choose("cuda")


def test_without_torch_there_is_nothing_to_do(machine: pytest.MonkeyPatch) -> None:
    """Where torch is not installed the plugin is off."""
    machine.setattr(selection, "torch_build", lambda: None)

    assert Choice("off", "torch is not installed") == choose("auto")
    assert Choice("off", "switched off") == choose("off")


def test_torchs_versions_are_read_from_its_files() -> None:
    """Version and CUDA version are those of torch's own module.

    Not of the module as it stands: a simulated card answers for the CUDA version.
    """
    import torch

    said = runpy.run_path(torch.version.__file__)

    build = torch_build()

    assert (
        TorchBuild(*(said[n] for n in ("__version__", "cuda", "hip", "xpu"))) == build
    )


@pytest.mark.parametrize("version", ["1.13.1", "2.7.1+cu128"])
def test_a_torch_that_is_too_old_is_named(
    machine: pytest.MonkeyPatch, version: str
) -> None:
    """With what is needed; a run without a device goes on."""
    machine.setattr(selection, "torch_build", lambda: TorchBuild(version, "12.8"))

    for backend in ("auto", "cuda", "simulated"):
        with pytest.raises(DeviceUnavailableError, match=re.escape(version)):
            choose(backend)
    assert "off" == choose("off").kind


@pytest.fixture
def amd(machine: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with torch for ROCm; its kernel lists a processor and a card."""
    machine.setattr(
        selection, "torch_build", lambda: TorchBuild("2.13.0+rocm7.1", hip="7.1.25424")
    )
    find = accelerators.why_no_amd_card
    machine.setattr(selection, "why_no_amd_card", lambda: find(tmp_path))
    for name in ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        machine.delenv(name, raising=False)
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for number, count in enumerate((0, 304)):
        (nodes / str(number)).mkdir(parents=True)
        (nodes / str(number) / "properties").write_text(
            f"cpu_cores_count {96 if not count else 0}\nsimd_count {count}\n"
        )
    return nodes


@pytest.mark.usefixtures("amd")
def test_an_amd_card_is_a_real_one() -> None:
    """ROCm's cards are torch's cuda; they are not replaced by a simulated one."""
    assert Choice("cuda", "a usable card") == choose("auto")
    assert Choice("cuda", "as requested") == choose("cuda")
    assert "simulated" == choose("simulated").kind


@pytest.mark.parametrize("change", ["none", "unreadable", "HIP_VISIBLE_DEVICES"])
def test_without_an_amd_card_the_device_is_simulated(
    machine: pytest.MonkeyPatch, amd: Path, change: str
) -> None:
    """Auto says what is missing; cuda ends with it."""
    if change == "none":
        (amd / "1" / "properties").unlink()
    elif change == "unreadable":
        (amd / "1" / "properties").unlink()
        (amd / "1" / "properties").mkdir()
    else:
        machine.setenv(change, "-1")

    kind, reason = choose("auto")

    assert "simulated" == kind
    assert reason.startswith("torch 2.13.0+rocm7.1 is built for ROCm, but ")
    assert change in reason or "no AMD card" in reason
    with pytest.raises(DeviceUnavailableError, match="built for ROCm, but"):
        choose("cuda")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (TorchBuild("2.13.0"), "Apple's GPU (mps)"),
        (TorchBuild("2.13.0+xpu", xpu="20250301"), "Intel's GPU (xpu)"),
    ],
)
def test_another_accelerator_is_left_alone(
    machine: pytest.MonkeyPatch, tmp_path: Path, build: TorchBuild, named: str
) -> None:
    """Auto names it and says how to simulate; simulated does so."""
    machine.setattr(selection, "torch_build", lambda: build)
    if build.xpu:
        vendor = tmp_path / "sys/class/drm/renderD128/device/vendor"
        vendor.parent.mkdir(parents=True)
        vendor.write_text("0x8086\n")
        find = accelerators.other_accelerator
        machine.setattr(
            selection, "other_accelerator", lambda each: find(each, tmp_path)
        )
    else:
        machine.setattr(sys, "platform", "darwin")
        machine.setattr(platform, "machine", lambda: "arm64")

    kind, reason = choose("auto")

    assert "off" == kind
    assert named in reason
    assert "--gpu-backend=simulated" in reason
    assert "simulated" == choose("simulated").kind


def test_intel_s_build_without_intel_s_card_simulates(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A build alone computes nothing."""
    build = TorchBuild("2.13.0+xpu", xpu="20250301")
    machine.setattr(selection, "torch_build", lambda: build)
    find = accelerators.other_accelerator
    machine.setattr(selection, "other_accelerator", lambda each: find(each, tmp_path))

    assert Choice(
        "simulated", f"torch {build.version} is built without CUDA"
    ) == choose("auto")


def test_a_call_follows_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback runs once, when the module is whole, before import returns."""
    (tmp_path / "late_module.py").write_text("VALUE = 7\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []

    def look() -> None:
        seen.append(sys.modules["late_module"].VALUE)

    AfterImport("late_module", look).start()
    late_module = importlib.import_module("late_module")
    AfterImport("late_module", look).start()
    withdrawn = AfterImport("never_imported", look)
    withdrawn.start()
    withdrawn.stop()
    withdrawn.stop()

    assert [7, 7] == seen
    assert "SourceFileLoader" in type(late_module.__loader__).__name__


def test_a_call_waits_while_a_module_is_only_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries look whether there is torch before they import it; or it fails once."""
    (tmp_path / "looked_for.py").write_text("import sys\nsys.look_for_it", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[str] = []
    hooks = [AfterImport("looked_for", lambda: seen.append("now")) for _ in range(2)]
    for hook in hooks:
        hook.start()

    assert importlib.util.find_spec("looked_for") is not None
    with pytest.raises(AttributeError, match="look_for_it"):
        importlib.import_module("looked_for")
    before = list(seen)
    monkeypatch.setattr(sys, "look_for_it", True, raising=False)
    hooks[0].stop()
    importlib.import_module("looked_for")

    assert [] == before
    assert ["now"] == seen
    assert not set(hooks) & set(sys.meta_path)
