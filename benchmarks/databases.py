"""PyTorch's databases of operators, modules and optimisers on the simulated card.

Run: ``python benchmarks/databases.py [--write] [--samples N] [NAME …]``. It runs every
operator of ``op_db``, module of ``module_db`` and optimiser of ``optim_db`` that comes
with the installed torch, or those of the given names, and compares each result with the
CPU's. It ends with exit code 1 if a difference is not in the list
``tests/support/operator_differences.py``, or an entry of that list is no longer needed.
``--write`` writes the page ``docs/databases.md``. ``--samples`` takes the first N samples
of each operator and type, not all. All samples take hours: ``--keep FILE`` keeps what is
done, and continues from there. ``--processes`` sets a number below that of the CPUs.

Worker processes run the samples: a sample that ends or hangs its process is a finding
too.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests/support"), str(ROOT / "docs")]

from generators.markdown import page, table  # noqa: E402  # after sys.path is set
from operator_differences import (  # noqa: E402  # after sys.path is set
    DIFFERENCES,
    LEVELS,
    Finding,
    listed,
    unused,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

PAGE: Final = ROOT / "docs" / "databases.md"
#: Seconds for all samples of one operator; a process that takes longer is ended.
PATIENCE_S: Final = 600
#: Seconds for a process to import torch and its databases.
START_S: Final = 300


# -- processes --------------------------------------------------------------------------


def work() -> None:
    """Answer each line, a task in JSON, by one line: its findings in JSON."""
    from pytest_gpumem.devices.simulated.install import (
        simulated_device,
    )

    with simulated_device("A100-40GB"):
        # The databases look for a card when they are imported.
        from module_runs import (
            MODULES,
            OPTIMISERS,
            run_module,
            run_optimiser,
        )
        from operator_runs import (
            OPERATORS,
            frozen,
            run_operator,
        )

        kinds: dict[str, tuple[Any, Any]] = {
            "operator": (OPERATORS, run_operator),
            "module": (MODULES, run_module),
            # Its samples are settings; the last ones are for cards only.
            "optimiser": (OPTIMISERS, lambda name, _limit: run_optimiser(name, None)),
        }
        names = [
            [kind, name] for kind, (known, _run) in kinds.items() for name in known
        ]
        print(json.dumps(names), flush=True)
        with frozen():
            for line in sys.stdin:
                kind, name, limit = json.loads(line)
                print(json.dumps(kinds[kind][1](name, limit)), flush=True)


class Worker:
    """A process that runs one task after another; if it ends, a new one replaces it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process: Any = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(
            target=self._read, args=(self._process, self._lines), daemon=True
        )
        reader.start()
        self.names: list[list[str]] = json.loads(self._lines.get(timeout=START_S))

    @staticmethod
    def _read(process: Any, lines: queue.Queue[str]) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def run(self, kind: str, name: str, limit: int | None) -> list[Finding]:
        """Return the findings of one task; the end of the process is a finding too."""
        self._process.stdin.write(json.dumps([kind, name, limit]) + "\n")
        self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=PATIENCE_S)
        except queue.Empty:
            line = ""
            text = f"takes more than {PATIENCE_S} s"
            self._process.kill()
        else:
            text = "ends the process"
        if line:
            return [Finding(*each) for each in json.loads(line)]
        self._process.wait()
        self._start()
        return [Finding(name, "", "process", LEVELS[-1], 1, text)]

    def end(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def _is_unlisted(finding: Finding) -> bool:
    return finding.level != LEVELS[0] and listed(finding) is None


class Kept:
    """What is done, in a file, if there is one: a run that was stopped goes on there.

    Args:
        file: A line in JSON for each task; None keeps nothing.
        limit: How many samples of each; what was run with another is done again.
    """

    def __init__(self, file: Path | None, limit: int | None) -> None:
        self._file = file
        self._limit = limit
        self._lock = threading.Lock()
        self.findings: dict[tuple[str, str], list[Finding]] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                kind, name, limit_then, _seconds, findings = json.loads(line)
                if limit_then == limit:
                    self.findings[kind, name] = [Finding(*each) for each in findings]

    def add(self, kind: str, name: str, seconds: float, found: list[Finding]) -> None:
        """Keep the result of one task."""
        with self._lock:
            self.findings[kind, name] = found
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as out:
                    task = [kind, name, self._limit, round(seconds, 1), found]
                    out.write(json.dumps(task) + "\n")


def collect(
    names: list[str], limit: int | None, processes: int, file: Path | None
) -> list[tuple[str, Finding]]:
    """Run what is named, or all; return findings with their kind."""
    first = Worker()
    wanted = [each for each in first.names if not names or each[1] in names]
    kept = Kept(file, limit)
    tasks: queue.Queue[list[str]] = queue.Queue()
    for each in wanted:
        if tuple(each) not in kept.findings:
            tasks.put(each)

    def serve(worker: Worker) -> None:
        while True:
            try:
                kind, name = tasks.get_nowait()
            except queue.Empty:
                worker.end()
                return
            start = time.monotonic()
            findings = worker.run(kind, name, limit)
            for each in filter(_is_unlisted, findings):
                print(f"not listed: {each}", flush=True)
            kept.add(kind, name, time.monotonic() - start, findings)

    others = min(processes, tasks.qsize()) - 1
    threads = [
        threading.Thread(target=lambda: serve(Worker())) for _other in range(others)
    ]
    for thread in threads:
        thread.start()
    serve(first)
    for thread in threads:
        thread.join()
    return [(kind, each) for kind, name in wanted for each in kept.findings[kind, name]]


# -- the page -----------------------------------------------------------------------------


class Group(NamedTuple):
    """Findings of one kind, counted by level."""

    names: int
    counts: Counter[str]


def _grouped(found: Iterable[tuple[str, Finding]], key: Any) -> dict[str, Group]:
    names: dict[str, set[str]] = {}
    counts: dict[str, Counter[str]] = {}
    for kind, each in found:
        group = key(kind, each)
        if group:
            names.setdefault(group, set()).add(each.operator)
            counts.setdefault(group, Counter())[each.level] += each.samples
    return {each: Group(len(names[each]), counts[each]) for each in names}


def _counted(head: str, groups: dict[str, Group]) -> str:
    return table(
        (head, "names", "comparisons", *LEVELS),
        (
            (
                name,
                f"{group.names:,}",
                f"{group.counts.total():,}",
                *(f"{group.counts[level]:,}" for level in LEVELS),
            )
            for name, group in groups.items()
        ),
    )


def _reasons(found: list[tuple[str, Finding]]) -> str:
    names: dict[int, dict[str, None]] = {}
    counts: Counter[int] = Counter()
    for _kind, each in found:
        number = listed(each)
        if number is not None:
            names.setdefault(number, {})[each.operator] = None
            counts[number] += each.samples
    return table(
        ("what", "how", "comparisons", "why"),
        (
            (
                ", ".join(f"`{each}`" for each in names[number]),
                f"{DIFFERENCES[number].level}: {DIFFERENCES[number].ways or 'every way'}",
                f"{counts[number]:,}",
                DIFFERENCES[number].reason,
            )
            for number in sorted(names)
        ),
    )


def render(found: list[tuple[str, Finding]], version: str, limit: int | None) -> str:
    """Return the page."""
    how_many = (
        "all their samples" if limit is None else f"the first {limit} samples each"
    )
    return page(
        [
            "# PyTorch's own databases on the simulated card",
            "Made by `tox run -e databases -- --write`. Every release of torch "
            "contains the databases from which its own tests are generated: `op_db` "
            "(operators), `module_db` and `optim_db`. Each entry is run on the "
            "simulated card, with samples that are created there, in all its variants: "
            "as a function, as a method, in place, with `out=` (right, empty, strided, "
            "of another type), its gradient, and its wrong inputs. The results must be "
            "on the card and equal the CPU's bit by bit, also in type, shape, strides, "
            "shared memory and version counter. An error must have torch's class. No "
            "byte may stay on the card.",
            f"torch {version}; float32, float16, bfloat16, complex64, int64 and bool; "
            f"{how_many}. A type that a card does not support must be refused with an "
            f"error of torch's class. A type that only a card supports must give a "
            f"result, or be refused by name.",
            _counted("database", _grouped(found, lambda kind, _each: f"{kind}s")),
            "*Within tolerance* is that of `torch.testing.assert_close`. *Refused* is "
            "`UnsupportedOnSimulatedDeviceError`, which names what cannot be simulated. "
            "Every comparison that is not equal is listed below, with the reason. `tox "
            "run -e databases` fails for any other difference, and for an entry of the "
            "list that is no longer needed.",
            "## Operators, by type",
            _counted(
                "type",
                _grouped(
                    found,
                    lambda kind, each: (
                        (each.dtype or "wrong inputs") if kind == "operator" else ""
                    ),
                ),
            ),
            "## Operators, by way",
            _counted(
                "way",
                _grouped(
                    found, lambda kind, each: each.way if kind == "operator" else ""
                ),
            ),
            "## What is not equal, and why",
            _reasons(found),
        ]
    )


def main() -> int:
    """Run the databases; tell whether every difference is listed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--samples", type=int, metavar="N")
    parser.add_argument(
        "--processes", type=int, metavar="N", default=len(os.sched_getaffinity(0))
    )
    parser.add_argument("--keep", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return 0
    found = collect(options.names, options.samples, options.processes, options.keep)
    counts = Counter[str]()
    for _kind, each in found:
        counts[each.level] += each.samples
    print(", ".join(f"{counts[level]:,} {level}" for level in LEVELS))
    missing = [each for _kind, each in found if _is_unlisted(each)]
    # An entry may speak of a second sample.
    is_part = options.names or options.samples == 1
    stale = [] if is_part else list(unused(each for _kind, each in found))
    for entry, name in stale:
        print(f"no longer needed: {name} in {entry}")
    if options.write:
        from importlib.metadata import version

        PAGE.write_text(
            render(found, version("torch"), options.samples), encoding="utf-8"
        )
        print(f"written: {PAGE.name}")
    return int(bool(missing or stale))


if __name__ == "__main__":
    sys.exit(main())
