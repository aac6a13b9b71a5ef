"""How long sweeps take, and what an injector costs while nothing is armed.

Run: ``python benchmarks/sweep.py [--full]``. The full sweep of bert-large takes some
minutes; without ``--full`` it is measured by sites only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pytest_gpumem import OomInjector, make_checkpoint, simulated_device, sweep_ooms
from pytest_gpumem.sweeps.sweep_record import summary_of
from pytest_gpumem.sweeps.text import summarise

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem import Outcome, SweepReport


def small_body() -> torch.Tensor:
    """Load a two-layer encoder and run it."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda()
    with torch.no_grad():
        output: torch.Tensor = model(torch.ones(2, 16, 64, device="cuda"))
    return output.cpu()


def large_body(path: str | Path) -> Callable[[], Any]:
    """Return a load of bert-large with a CPU fallback."""
    from transformers import AutoModelForSequenceClassification

    load = AutoModelForSequenceClassification.from_pretrained

    def body() -> str:
        model: Any = None
        try:
            model = load(path, device_map="cuda:0")
        except torch.OutOfMemoryError:
            pass
        if model is None:
            model = load(path)
        return str(sum(each.numel() for each in model.parameters()))

    return body


def sweep(body: Callable[[], Any], **options: Any) -> tuple[SweepReport, float]:
    """Return a sweep's report and its seconds, all runs included."""
    started_s = time.perf_counter()
    report = sweep_ooms(body, **options)
    return report, time.perf_counter() - started_s


def show(done: int, total: int, _outcome: Outcome) -> None:
    """Say how far the sweep is, now and then."""
    if done % 50 == 0:
        print(f"... {done} of {total}", file=sys.stderr)


#: A test of the load above. Python finds this module by its folder.
TEST = """
import pytest
from sweep import large_body

@pytest.mark.oom_sweep(recover=True)
def test_load(bert_large):
    assert int(large_body(bert_large)()) > 3e8
"""
#: With these, glibc keeps memory that the loader's threads have freed; see mallopt(3).
KEEPING = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
}


def measure_workers(settings: dict[str, str]) -> tuple[float, str]:
    """Return the seconds of a run in which two workers share a sweep, and its last line."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_load.py").write_text(TEST, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2"]
        command += ["-p", "no:cacheprovider", "--gpu-card=T4", folder]
        paths = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
        environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)}
        started_s = time.perf_counter()
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment
        )
        return time.perf_counter() - started_s, done.stdout.splitlines()[-1]


def measure_disarmed() -> float:
    """Return the seconds of allocating with a disarmed injector over those without."""

    def allocate() -> float:
        started_s = time.process_time()
        for _ in range(20_000):
            torch.empty(16, device="cuda")
        return time.process_time() - started_s

    plain, disarmed = [], []
    for _ in range(9):
        plain.append(allocate())
        with OomInjector() as injector:
            injector.arm("any:nth=1")
            injector.disarm()
            disarmed.append(allocate())
    return statistics.median(disarmed) / statistics.median(plain)


def main() -> None:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="also every allocation of bert-large"
    )
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    path = str(make_checkpoint("bert-large"))
    body = large_body(path)
    print("| what | measured | bar |\n|---|---|---|")
    with simulated_device("T4"):
        sweep(small_body, points=1)  # what is imported and built on first use
        report, seconds = sweep(small_body)
        print(
            f"| two-layer encoder, load and forward: {summarise(summary_of(report))} | "
            f"{len(report.outcomes) / seconds:.0f} points/s | 50 |"
        )
        report, seconds = sweep(body, points="sites", recover=True)
        print(
            f"| bert-large by sites: {summarise(summary_of(report))} | {seconds:.0f} s | 60 s |",
            flush=True,
        )
        if asked.full:
            report, seconds = sweep(body, recover=True, progress=show)
            print(
                f"| bert-large, every allocation: {summarise(summary_of(report))} | "
                f"{seconds / 60:.1f} min | 3 min |"
            )
            for words, settings in (("", {}), (", glibc keeps memory", KEEPING)):
                seconds, line = measure_workers(settings)
                print(
                    f"| the same by two workers of pytest-xdist{words}: {line} | "
                    f"{seconds / 60:.1f} min | 3 min |",
                    flush=True,
                )
        print(f"| disarmed injector / none | {measure_disarmed():.3f} | 1.01 |")


if __name__ == "__main__":
    main()
