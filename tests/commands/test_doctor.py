"""What the doctor finds on this machine and on others."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem import doctor
from pytest_gpumem.allocator.versions import installed_version
from pytest_gpumem.cli import main
from pytest_gpumem.devices.selection import torch_build

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of 8 KiB, and no settings."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(b"x" * 8192)
    monkeypatch.setenv("PYTEST_GPUMEM_CACHE", str(tmp_path / "cache"))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


def _names(found: doctor.Examination) -> str:
    return "\n".join(f"{each.what}; {each.advice}" for each in found.problems)


def test_it_tells_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text and JSON say the same; a machine that can run tests gives 0."""
    assert 0 == main(["doctor"])
    text = capsys.readouterr().out
    assert 0 == main(["doctor", "--json"])
    told: dict[str, Any] = json.loads(capsys.readouterr().out)

    build = torch_build()
    version = build.version if build else ""
    assert version == told["facts"]["torch"]
    assert told["is_well"]
    assert f"--gpu-backend=auto means {told['backend']}: {told['reason']}" in text
    assert f"{tmp_path / 'cache'}, 8 KiB" == told["facts"]["checkpoint cache"]
    for name in ("driver", "cards", "pytest", "jinja2", "CUDA_VISIBLE_DEVICES"):
        assert name in told["facts"]
        assert f"\n{name} " in text
    assert "all is well" in text


def test_wrong_settings_are_fatal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 1, the problem stands first."""
    monkeypatch.setenv(installed_version().variables[0], "no_such_thing:1")

    assert 1 == main(["doctor"])
    text = capsys.readouterr().out
    assert "problem: " in text
    assert "no_such_thing" in text
    assert "tests cannot run like this" in text


def test_a_machine_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can run, and the advice says what is enough."""
    monkeypatch.setattr(doctor, "torch_build", lambda: None)
    monkeypatch.setattr(
        "pytest_gpumem.devices.selection.torch_build", lambda: None, raising=True
    )
    found = doctor.examine()

    assert not found.is_well
    assert ("off", "") == (found.backend, found.card)
    assert "torch is not installed" == found.problems[0].what
    assert "the build for CPUs is enough" in found.problems[0].advice


def test_what_is_missing_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries, disk and a cache that cannot be written do not stop a run."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=2**20))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(doctor, "_version", lambda name: None if "-" in name else "1")
    found = doctor.examine()

    assert found.is_well
    for text in (
        "pytest-xdist is not installed; pip install pytest-xdist for several workers",
        "1 MiB of disk are free at ",
        "cannot be written; set PYTEST_GPUMEM_CACHE",
    ):
        assert text in _names(found)
