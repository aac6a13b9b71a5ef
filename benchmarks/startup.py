"""What the plugin costs a suite that touches no GPU.

Runs pytest over 1,000 trivial tests, with the plugin and without, in turn, and compares
the processor time of the fastest runs and of the faster half, which other programs
disturb least. Before that, what ``import pytest_gpumem`` costs beside ``import pytest``.

Run: ``python benchmarks/startup.py``
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = 1000
ROUNDS = 40
IMPORTS = 10


def run(folder: Path, *options: str) -> float:
    """Return the processor seconds (user and system) of one run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Installed packages have bytecode; an editable installation must be allowed to write
    # it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def import_ms(module: str) -> float:
    """Return the median milliseconds of an import, in a process of its own each."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    took_us = []
    for _ in range(IMPORTS + 1):
        done = subprocess.run(
            command, check=True, capture_output=True, env=environment, text=True
        )
        last = done.stderr.splitlines()[-1]
        took_us.append(int(last.split("|")[1]))
    return statistics.median(took_us[1:]) / 1000  # the first may write bytecode


def main() -> None:
    """Print the figures, in Markdown."""
    own, pytests = import_ms("pytest_gpumem"), import_ms("pytest")
    print(
        f"import pytest_gpumem {own:.1f} ms, pytest {pytests:.1f} ms, {own / pytests:.3f}\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = "import pytest\n\n\n@pytest.mark.parametrize('n', range(1000))\ndef test_it(n): pass\n"
        (folder / "test_trivial.py").write_text(text, encoding="utf-8")
        (folder / "conftest.py").write_text(
            "import sys\n\n\ndef pytest_sessionfinish():\n    assert 'torch' not in sys.modules\n",
            encoding="utf-8",
        )
        timings: dict[str, list[float]] = {"with": [], "without": []}
        asks = "--gpu-backend=auto"
        run(folder, asks)
        for _ in range(ROUNDS):
            timings["without"].append(run(folder, "-p", "no:gpumem"))
            timings["with"].append(run(folder, asks))
    print("| 1,000 trivial tests | fastest | faster half |\n|---|---|---|")
    for name, values in timings.items():
        print(f"| {name} the plugin | {min(values):.3f} s | {quick(values):.3f} s |")
    fastest = min(timings["with"]) / min(timings["without"])
    half = quick(timings["with"]) / quick(timings["without"])
    print(f"| with / without | {fastest:.3f} | {half:.3f} |")


def quick(values: list[float]) -> float:
    """Return the mean of the faster half, which other programs disturbed least."""
    return statistics.fmean(sorted(values)[: len(values) // 2])


if __name__ == "__main__":
    main()
