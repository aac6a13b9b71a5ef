"""The reproductions of docs/third-party.md run as they stand and show what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "third-party.md"
BLOCKS = dict(
    re.findall(
        r"^### (.*?)\n.*?^```python\n(.*?)^```",
        PAGE.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
)
#: What each prints at its end.
SHOWN = {
    "PyTorch Lightning": "*128",
    "torch-max-mem": "*(60, 0), (30, 29360128), (15, 29360128), *(1, 29360128)]",
    "MONAI": "*Seems to be OOM.*",
    "FlagEmbedding": "*'list' object has no attribute 'keys'",
    "TorchSim": "*1\nCUDA out of memory.*",
}


def test_every_finding_has_its_reproduction() -> None:
    """The Trainer's is run where transformers is at hand."""
    assert {*SHOWN, "Trainer"} == set(BLOCKS)


@pytest.mark.parametrize("name", SHOWN)
def test_a_reproduction_shows_the_finding(tmp_path: Path, name: str) -> None:
    """In a process of its own, as a reader would run it."""
    script = tmp_path / "script.py"
    script.write_text(BLOCKS[name], encoding="utf-8")

    run = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, run.stderr
    assert fnmatchcase(run.stdout.strip(), SHOWN[name]), run.stdout
