"""The cost of recording a test's timeline: python benchmarks/timeline.py.

A report of the kinds json and html has the timeline of each test. A load and a forward
of a small BERT, and a layer of eight numbers as the worst there is, with a timeline and
without one, in turn; processor time.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem import make_checkpoint, simulated_device
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.instruments.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 15


def seconds(body: Callable[[], object]) -> float:
    """Return the processor time of a body."""
    start = time.process_time()
    body()
    return time.process_time() - start


def measure(name: str, body: Callable[[], object]) -> None:
    """Print a row: the medians of both times and of their ratio, and the time of each event."""
    body()
    device = active_device()
    pairs = []
    num_events = 0
    for _ in range(ROUNDS):
        without = seconds(body)
        with Timeline(device) as timeline:
            recorded = seconds(body)
        num_events = timeline.result()[0]["num_events"]
        pairs.append((without, recorded))
    ratio = statistics.median(recorded / without for without, recorded in pairs)
    without, recorded = (statistics.median(each) for each in zip(*pairs, strict=True))
    more = (min(p[1] for p in pairs) - min(p[0] for p in pairs)) / num_events
    print(
        f"| {name} | {num_events} | {without * 1e3:.1f} ms | {recorded * 1e3:.1f} ms | "
        f"{ratio:.3f} | {more * 1e6:.1f} us |"
    )


def main() -> None:
    """Print a table in Markdown."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from transformers import AutoModelForSequenceClassification

    path = make_checkpoint("bert-small")
    with simulated_device("T4"):
        tokens = torch.arange(1000, 1128)[None].to("cuda")
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            path, device_map="cuda:0"
        )
        tiny = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(50))).cuda()
        numbers = torch.ones(1, 8, device="cuda")
        print("| what | events | without | with | ratio | each event |")
        print("|---|---|---|---|---|---|")
        with torch.no_grad():
            measure(
                "bert-small: load",
                lambda: AutoModelForSequenceClassification.from_pretrained(
                    path, device_map="cuda:0"
                ),
            )
            measure("bert-small: forward 1x128", lambda: model(tokens))
            measure("50 layers of 8x8", lambda: tiny(numbers))


if __name__ == "__main__":
    main()
