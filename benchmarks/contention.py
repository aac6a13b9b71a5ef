"""Eight workers on one simulated card of 16 GiB: with admission and without.

Run: ``python benchmarks/contention.py``. The suite has tests of 1 to 8 GiB that say so,
and hold their bytes for a time; together the workers want more than the card has. A
watcher adds up what all processes hold.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from pytest_gpumem.sizes import format_size
from pytest_gpumem.tables import align
from pytest_gpumem.tenancy.entries import Folder

CARD = "16GiB"
TESTS = 96
WORKERS = 8
SUITE = """
import time
import pytest
import torch

SIZES = [1 + (5 * number + number // 7) % 9 for number in range({tests})]

@pytest.mark.parametrize(
    "size",
    [
        pytest.param(size, {marks})
        for size in SIZES
    ],
)
def test_holds(size):
    weights = torch.empty(size * 2**30, dtype=torch.uint8, device="cuda")
    time.sleep(0.5)
"""
DECLARED = 'marks=pytest.mark.requires_vram(f"{size}GiB")'


class Watcher:
    """Adds up what processes hold of the card, as often as it can."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            for folder in self._root.glob("run-*/card-0"):
                entries = Folder(folder).read().values()
                held = sum(entry["nbytes"] for entry in entries)
                self.peak_bytes = max(self.peak_bytes, held)

    def __enter__(self) -> Watcher:  # noqa: PYI034  # Self needs Python 3.11
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()


def run(suite: str, *options: str) -> tuple[dict[str, int], float, int]:
    """Return outcomes, seconds of the whole run, and the peak of the sum in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_suite.py").write_text(suite, encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        environment = {**os.environ, "PYTEST_GPUMEM_TENANCY": str(folder / "tenancy")}
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", *options]
        command += [
            f"--gpu-card={CARD}",
            "--gpu-values=none",
            "--gpu-backend=simulated",
        ]
        started_s = time.perf_counter()
        with Watcher(folder / "tenancy") as watcher:
            result = subprocess.run(  # our own program
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        seconds = time.perf_counter() - started_s
    last = result.stdout.strip().splitlines()[-1]
    outcomes = {word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", last)}
    if not outcomes:
        raise SystemExit(result.stdout + result.stderr)
    return outcomes, seconds, watcher.peak_bytes


def main() -> None:
    """Print the table."""
    plain = SUITE.format(tests=TESTS, marks="")
    declared = SUITE.format(tests=TESTS, marks=DECLARED)
    many = ("-n", str(WORKERS))
    ways = {
        "serial": (plain, ()),
        f"{WORKERS} workers, no admission": (plain, (*many, "--gpu-share=off")),
        f"{WORKERS} workers, equal shares": (plain, many),
        f"{WORKERS} workers, tests say what they need": (declared, many),
    }
    rows = [("run", "passed", "time", "of serial", "peak of the sum")]
    serial_s = 0.0
    for name, (suite, options) in ways.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcomes, seconds, peak = run(suite, *options)
        serial_s = serial_s or seconds
        rows.append(
            (
                name,
                f"{outcomes.get('passed', 0)} of {TESTS}",
                f"{seconds:.1f} s",
                f"{seconds / serial_s:.2f}",
                format_size(peak),
            )
        )
    print(f"a card of {CARD}; tests hold 1 to 8 GiB for half a second")
    for line in align(rows, left=(0,)):
        print(line)


if __name__ == "__main__":
    main()
