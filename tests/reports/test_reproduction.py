"""The report that is pasted into an issue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch  # noqa: F401  # inner runs in this process must find it imported

from pytest_gpumem.reports.reproduction import anonymous

if TYPE_CHECKING:
    import pytest

pytest_plugins = ["pytester"]

CODE = """
import pytest
import torch


@pytest.mark.oom_sweep(recover=True)
def test_swept():
    torch.ones(3, device="cuda")


@pytest.mark.max_vram("1MiB")
def test_limited():
    torch.ones(2**19, device="cuda")


def test_too_large():
    torch.ones(2**23, device="cuda")


def test_good():
    torch.ones(3, device="cuda")
"""


def test_each_failure_has_its_command_and_its_reason(pytester: pytest.Pytester) -> None:
    """The options that tests depend on are in the command, those of outputs are not."""
    file = pytester.makepyfile(CODE).name
    options = ["--gpu-backend=auto", "--gpu-card=L4", "--gpu-budget=24MiB"]

    pytester.runpytest(*options, "--gpu-report=issue:bug.md", "--gpu-snapshots=.")

    text = Path("bug.md").read_text(encoding="utf-8")
    given = " ".join(options)
    assert f"$ pytest {file}::test_limited {given}\n" in text
    assert f"$ pytest {file}::test_swept --gpu-replay-oom=any:nth=1 {given}\n" in text
    assert f"- 2 x clean OOM at `{file}:7 in test_swept (other)`\n" in text
    assert "- limit on allocated on cuda:0, call: 1 MiB, measured 2 MiB\n" in text
    assert f" at `{file}:16 in test_too_large (other)`\n" in text
    assert "- snapshot for memory_viz, to attach: `test" in text
    assert "torch 2" in text
    assert "pytest-gpumem 0" in text
    assert "test_good" not in text
    assert str(pytester.path) not in text


def test_a_gate_that_is_broken_is_described(pytester: pytest.Pytester) -> None:
    """With the figure before and now."""
    code = "import torch\n\ndef test_it():\n    torch.ones(2**18, device='cuda')\n"
    pytester.makepyfile(code)
    gate = ["--gpu-baseline=vram.json"]
    pytester.runpytest(*gate, "--gpu-update-baseline")
    pytester.makepyfile(code.replace("18", "20"))

    pytester.runpytest(*gate, "--gpu-report=issue:bug.md")

    text = Path("bug.md").read_text(encoding="utf-8")
    assert "- baseline: allocated was 1 MiB, is 4 MiB (+3 MiB)\n" in text
    assert "--gpu-baseline=vram.json\n" in text


def test_a_loader_without_a_test_file_is_named_by_its_option(
    pytester: pytest.Pytester,
) -> None:
    """Once, whatever its test is called."""
    pytester.makepyfile(loader_in_no_file="def load(): return None")
    option = "--gpu-check=loader_in_no_file:load"

    pytester.runpytest("--gpu-backend=auto", option, "--gpu-report=issue:bug.md")

    lines = Path("bug.md").read_text(encoding="utf-8").splitlines()
    commands = [each for each in lines if each.startswith("$ ")]
    assert [f"$ pytest --gpu-backend=auto {option}"] == commands[:1]
    assert all(each.count("--gpu-check") == 1 for each in commands)


def test_without_a_failure_it_says_so(pytester: pytest.Pytester) -> None:
    """An empty report is a report."""
    pytester.makepyfile("def test_it(): pass")

    pytester.runpytest("--gpu-card=T4", "--gpu-report=issue:bug.md")

    text = Path("bug.md").read_text(encoding="utf-8")
    assert "No test that used a card failed." in text


def test_folders_and_hosts_are_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A name that only begins with a host's, or a folder's, is another."""
    home = tmp_path / "home"
    (home / "project").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(home / "project")
    text = f"{home}/project/a.py {home}/b.py {home}2/c.py on box at box.py"

    assert anonymous(text, {"box"}).startswith("./a.py ~/b.py $TMPDIR")
    assert anonymous(text, {"box"}).endswith("/home2/c.py on HOST at box.py")
