"""Programs on the substitute CUDA runtime; ``runtime/host.h`` says what it is."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from substitute import environment

if TYPE_CHECKING:
    from collections.abc import Callable

if "CUDA_HOST_BUILD" not in os.environ:
    raise pytest.UsageError(
        "these tests need a substitute CUDA runtime: tox run -e cuda-host"
    )


@pytest.fixture(scope="session")
def runtime() -> Path:
    """The folder of the built runtime."""
    return Path(os.environ["CUDA_HOST_BUILD"])


@pytest.fixture
def start(runtime: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start a Python program on the substitute; those of one test share its cards."""

    def start_it(program: str, **settings: str) -> subprocess.Popen[str]:
        file = Path(tempfile.mkstemp(suffix=".py", dir=tmp_path)[1])
        file.write_text(program, encoding="utf-8")
        return subprocess.Popen(
            [sys.executable, file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(runtime)
            | {"CUDA_HOST_STATE": str(tmp_path / "cards"), "CUDA_HOST_CONTEXT": "0"}
            | settings,
        )

    return start_it


@pytest.fixture
def output(
    start: Callable[..., subprocess.Popen[str]],
) -> Callable[..., list[str]]:
    """Run a Python program on the substitute and return the lines that it printed."""

    def run_it(program: str, **settings: str) -> list[str]:
        process = start(program, **settings)
        out, err = process.communicate()
        assert 0 == process.returncode, err
        return out.splitlines()

    return run_it
