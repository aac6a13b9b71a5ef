"""The cost of the simulated device, as ratios; both sides are measured in turn.

Run: ``python benchmarks/device.py``. It builds bert-large's checkpoint (1.3 GB) and a
hollow 70-billion-parameter one first, if they are not in the cache.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pytest_gpumem import make_checkpoint, simulated_device
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

CARD = "A100-40GB"
OPERATIONS = 2000


def compare(
    first: Callable[[], Any], second: Callable[[], Any], rounds: int
) -> tuple[float, float]:
    """Return the seconds of two functions: each one's median over rounds in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for function, mine in zip((first, second), times, strict=True):
            gc.collect()
            started_s = time.perf_counter()
            result = function()
            mine.append(time.perf_counter() - started_s)
            del result
            if not number:
                mine.clear()  # the first round only warms up
    return statistics.median(times[0]), statistics.median(times[1])


def measure_operation() -> tuple[float, float]:
    """Return seconds of ``a + b`` of 16 floats: simulated, and under FakeTensorMode."""
    mode = FakeTensorMode()
    with mode:
        fake = torch.ones(16), torch.ones(16)
    card = torch.ones(16, device="cuda"), torch.ones(16, device="cuda")

    def add(first: torch.Tensor, second: torch.Tensor) -> None:
        for _ in range(OPERATIONS):
            first + second

    def faked() -> None:
        with mode:
            add(*fake)

    simulated_s, fake_s = compare(lambda: add(*card), faked, 9)
    return simulated_s / OPERATIONS, fake_s / OPERATIONS


def measure_forward(path: Path) -> tuple[float, float]:
    """Return seconds of bert-large's forward of 1x128: simulated, and on the CPU."""
    from transformers import AutoModelForSequenceClassification

    host = AutoModelForSequenceClassification.from_pretrained(path).eval()
    card = AutoModelForSequenceClassification.from_pretrained(
        path, device_map="cuda:0"
    ).eval()
    ids = torch.arange(128)[None]
    card_ids = ids.cuda()
    with torch.no_grad():
        return compare(lambda: card(card_ids), lambda: host(ids), 15)


def measure_load(path: Path) -> tuple[float, float]:
    """Return seconds of loading to a card, and to the CPU with one copy of the weights."""
    from transformers import AutoModelForSequenceClassification

    def to_host() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(path)
        with torch.no_grad():
            return [parameter.clone() for parameter in model.parameters()]

    def to_card() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            path, device_map="cuda:0"
        )

    return compare(to_card, to_host, 5)


def load_alone(path: str, values: str) -> None:
    """Load in a process of its own and print how far that raised its peak memory.

    The model's modules, which the first load imports, are there before.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.models.bert import modeling_bert  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    loads: dict[str, Any] = {
        "computed": (
            AutoModelForSequenceClassification,
            CARD,
            {"device_map": "cuda:0"},
        ),
        "none": (
            AutoModelForCausalLM,
            "A100-80GB*2",
            {"device_map": "auto", "dtype": "auto"},
        ),
    }
    auto_class, cards, options = loads[values]
    with simulated_device(cards, values=values):
        torch.empty(1, device="cuda")
        with Watch() as watch:
            model = auto_class.from_pretrained(path, **options)
        nbytes = sum(each.nbytes for each in model.parameters())
        print(watch.own, watch.resident, nbytes, status("VmHWM"), watch.took_s)


def status(name: str) -> int:
    """Return a figure of ``/proc/self/status``, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


class Watch:
    """Growth of a block's memory, in bytes: its own, and with mapped files' pages."""

    def __enter__(self) -> Watch:  # noqa: PYI034  # Self needs 3.11
        """Begin."""
        self.own = self.resident = 0
        self._first = status("RssAnon"), status("VmRSS")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        self._started_s = time.perf_counter()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self.own = max(self.own, status("RssAnon") - self._first[0])
            self.resident = max(self.resident, status("VmRSS") - self._first[1])

    def __exit__(self, *_error: object) -> None:
        """End."""
        self.took_s = time.perf_counter() - self._started_s
        self._done.set()
        self._thread.join()


def measure_alone(path: Path, values: str) -> list[float]:
    """Run ``load_alone`` in a process of its own and return the figures that it prints."""
    command = [sys.executable, __file__, str(path), values]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(word) for word in run.stdout.split()]


def main() -> None:
    """Print the table, in Markdown."""
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    large = make_checkpoint("bert-large")
    hollow = make_checkpoint(
        "llama-70b", weights="zeros", dtype="bfloat16", max_shard_size="5GB"
    )
    print("| what | measured | ratio | bar |\n|---|---|---|---|")
    with simulated_device(CARD):
        ours, theirs = measure_operation()
        print(
            f"| `a + b` of 16 floats, simulated / FakeTensorMode | {ours * 1e6:.1f} us "
            f"/ {theirs * 1e6:.1f} us | {ours / theirs:.2f} | 0.5 |"
        )
        ours, theirs = measure_forward(large)
        print(
            f"| bert-large forward 1x128, simulated / CPU | {ours * 1e3:.0f} ms / "
            f"{theirs * 1e3:.0f} ms | {ours / theirs:.2f} | 1.10 |"
        )
        ours, theirs = measure_load(large)
        print(
            f"| bert-large `device_map` load, simulated / CPU load and one copy | "
            f"{ours:.2f} s / {theirs:.2f} s | {ours / theirs:.2f} | 1.25 |"
        )
    own, resident, nbytes, _peak, _s = measure_alone(large, "computed")
    print(
        f"| host memory of that load / the model's bytes | {format_size(int(own))} / "
        f"{format_size(int(nbytes))} | {own / nbytes:.2f} ({resident / nbytes:.2f} "
        "with the pages of the mapped file) | 1.3 |"
    )
    _own, _resident, nbytes, peak, took_s = measure_alone(hollow, "none")
    print(
        f"| 70B decoder ({format_size(int(nbytes))}) on two 80 GB cards, no values | "
        f"{took_s:.1f} s, {format_size(int(peak))} of host memory | | 60 s, 4 GiB |"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load_alone(sys.argv[1], sys.argv[2])
    else:
        main()
