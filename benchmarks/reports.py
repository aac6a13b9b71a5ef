"""What the reports of 10,000 recorded tests cost: python benchmarks/reports.py."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path

from pytest_gpumem.files import write_atomically
from pytest_gpumem.instruments.timeline import Series
from pytest_gpumem.model.records import MemoryFigures, to_properties
from pytest_gpumem.plugin.reporting import render
from pytest_gpumem.reports.document import document, test_record

TESTS = 10_000
#: Events of each test: enough to fill a timeline.
EVENTS = 200


def properties(number: int) -> list[tuple[str, object]]:
    """Return what a test's report carries."""
    series = Series()
    for event in range(EVENTS):
        series.add((event * 7919 + number) % 97 * 2**20, 128 * 2**20)
    peak = 96 * 2**20 + number * 512
    card = {
        "device_index": 0,
        "budget_bytes": 2**30,
        "total_bytes": 16 * 2**30,
        "num_events": series.num_events,
        "peak_bytes": peak,
        "points": series.points,
        "live_at_peak": [
            {"site": f"tests/test_model.py:{n} in test_it (forward)", "bytes": 2**20}
            for n in range(12)
        ],
    }
    figures = MemoryFigures(0, peak, peak, peak, peak, 0, 0, 0, 0, 0)
    return [
        ("gpumem.environment", "Tesla T4, simulated, torch 2.13"),
        ("gpumem.timeline", json.dumps([card])),
        *to_properties("setup", figures),
        *to_properties("call", figures),
    ]


def main() -> None:
    """Print seconds and memory, as a table in Markdown."""
    reports = [
        (f"tests/test_{n % 100}.py::test_{n}", properties(n)) for n in range(TESTS)
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    start = time.perf_counter()
    tests = [test_record(name, "passed", 0.1, pairs) for name, pairs in reports]
    whole = document("synthetic", [each for each in tests if each is not None], None)
    print(f"| {TESTS} tests | seconds | MiB of file |\n|---|---|---|")
    print(f"| collected | {time.perf_counter() - start:.2f} | |")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("json", "html", "md"):
            began = time.perf_counter()
            path = Path(folder) / f"report.{kind}"
            write_atomically(path, render(kind, whole))
            seconds = time.perf_counter() - began
            print(f"| {kind} | {seconds:.2f} | {path.stat().st_size / 2**20:.1f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"| together | {time.perf_counter() - start:.2f} | |")
    print(f"\nPeak of the process {peak} MiB; before the reports {before} MiB.")


if __name__ == "__main__":
    main()
