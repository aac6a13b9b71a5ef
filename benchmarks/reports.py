"""The cost of the reports of 10,000 recorded tests: python benchmarks/reports.py.

Each row is a run of pytest in a process of its own whose tests do nothing but carry what
a recorded test carries: first without reports, then with one of each kind. The memory
is the process's peak above what it held before the run.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.instruments.timeline import Series
from pytest_gpumem.plugin.record_keeping import keep
from pytest_gpumem.records.memory_figures import MemoryFigures
from pytest_gpumem.records.record import LimitOutcome, PhaseFigures, Record

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = 10_000
#: Events of each test: enough to fill a timeline.
EVENTS = 200
KINDS = ("json", "html", "md")
FILE = "suite.recorded"


def record(number: int) -> Record:
    """Return the data that a test's report has."""
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
    return Record(
        "",
        "passed",
        0.0,
        "Tesla T4, simulated, torch 2.13",
        [PhaseFigures.of(phase, figures) for phase in ("setup", "call")],
        host="host",
        limits=[LimitOutcome("allocated", 0, "call", 2 * peak, peak, held=True)],
        timeline=json.dumps([card], separators=(",", ":")),
    )


class Recorded(pytest.Item):
    """A test with the record of a card attached."""

    number: int

    def runtest(self) -> None:
        """Attach the data that a recorded test has."""
        own = record(self.number)
        own.nodeid = self.nodeid
        keep(self, own)


class Suite(pytest.File):
    """All of the tests."""

    def collect(self) -> Iterator[Recorded]:
        """Yield them."""
        for number in range(TESTS):
            name = f"test_model[layers-{number}]"
            item: Recorded = Recorded.from_parent(self, name=name)
            item.number = number
            yield item


class Plugin:
    """Collects the suite."""

    def pytest_collect_file(
        self, file_path: Path, parent: pytest.Collector
    ) -> Suite | None:
        """Take the one file there is."""
        if file_path.name != FILE:
            return None
        suite: Suite = Suite.from_parent(parent, path=file_path)
        return suite


def peak_mib() -> float:
    """Return this process's peak memory, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(options: list[str]) -> None:
    """Run the suite here; print seconds and MiB as JSON on the last line."""
    before, start = peak_mib(), time.process_time()
    pytest.main(
        ["-q", "-p", "no:cacheprovider", "--gpu-backend=off", *options, FILE],
        plugins=[Plugin()],
    )
    print(json.dumps([time.process_time() - start, peak_mib() - before]))


def measure(folder: str, options: list[str]) -> tuple[float, float]:
    """Run the suite in a process of its own; return seconds and MiB."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, mib = json.loads(done.stdout.splitlines()[-1])
    return seconds, mib


def main() -> None:
    """Print seconds and memory, as a table in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / FILE).touch()
        options = [f"--gpu-report={kind}:report.{kind}" for kind in KINDS]
        without = measure(folder, ["--durations=1"])
        row = "| {} | {:.1f} s | {:.0f} MiB |"
        print(f"| {TESTS} recorded tests | processor time | memory |\n|---|---|---|")
        print(row.format("without reports", *without))
        together = measure(folder, options)
        print(row.format("all three reports", *together))
        more = (together[0] - without[0], together[1] - without[1])
        print(row.format("the reports' own part", *more))
        for kind in KINDS:
            size = (Path(folder) / f"report.{kind}").stat().st_size / 2**20
            print(f"\nreport.{kind}: {size:.1f} MiB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1:])
    else:
        main()
