"""Compare the figures of other tools for one task with the recorded ones.

The task is a load of bert-large in single precision, ``.to("cuda")`` and a forward of 8 x
128 tokens; see ``peer_runs.py``. The truth is ``tests/recordings``. Each tool runs in
processes of its own with one thread, all of them in turn, and the fastest run counts, in
processor time. What is not
installed is left out: FakeGPU is on no package index; put a clone of it on PYTHONPATH.

Run: ``python benchmarks/peers.py [--quick]``; ``--quick`` makes one round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

from pytest_gpumem import format_size, make_checkpoint

HERE: Final = Path(__file__).parent
RECORDING: Final = HERE.parent / "tests" / "recordings" / "bert_large_allocator.json"
ROUNDS: Final = 1 if "--quick" in sys.argv else 3
#: Characters of an error that a cell shows.
SHOWN: Final = 60


class Peer(NamedTuple):
    """A tool beside others.

    Attributes:
        name: Its name in ``peer_runs.PEERS``.
        title: Its name in the table.
        package: The package whose version is shown.
        way: The part of the task that it runs.
        injects: Whether it can make a chosen allocation fail, by its documentation.
    """

    name: str
    title: str
    package: str
    way: str
    injects: bool = False


PEERS: Final = (
    Peer("gpumem", "pytest-gpumem", "pytest-gpumem", "the task", injects=True),
    Peer("memray", "pytest-memray", "pytest-memray", 'the task with `"cpu"`'),
    Peer("torch", "pytest-torch", "pytest-torch", 'the task with `"cpu"`'),
    Peer("memtracker", "MemTracker", "torch", 'the task with `"cpu"`'),
    Peer("fake", "FakeTensorMode with MemTracker", "torch", "`from_config`"),
    Peer("accelerate", "accelerate's estimate", "accelerate", "`from_config`, no run"),
    Peer("fakegpu", "FakeGPU", "fakegpu", "the task, buffers initialised by hand"),
)


def measure(name: str, path: str) -> dict[str, Any]:
    """Return what one process of a tool finds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / "peer_runs.py"), name, path, str(result)]
        # One thread each, so that other programs on the machine disturb the times less.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment
        )
        if not result.exists():
            return {"failed": (run.stderr.strip().splitlines() or ["no output"])[-1]}
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def recorded() -> dict[str, Any]:
    """Return the recorded figures: after the load, of the forward, and the OOM's text."""
    cases = json.loads(RECORDING.read_text(encoding="utf-8"))["cases"]
    (task,) = (
        case["result"]
        for case in cases
        if case["case"]
        == {"load": "to", "dtype": "fp32", "phase": "infer", "attn": "sdpa"}
    )
    (small,) = (
        case["result"]
        for case in cases
        if case["case"]["phase"] == "load" and "oom" in case["result"]
    )
    return {
        "load_bytes": task["load"]["peak_allocated"],
        "forward_bytes": task["forward_1"]["peak_allocated"],
        "reserved_bytes": task["forward_1"]["peak_reserved"],
        "oom": small["oom"],
    }


def all_rounds(path: str) -> dict[str, dict[str, Any]]:
    """Return what each tool finds, with the seconds of its fastest run."""
    found: dict[str, dict[str, Any]] = {}
    for number in range(ROUNDS):
        for name in ("cpu", *(peer.name for peer in PEERS)):
            before = found.get(name, {})
            if "missing" in before or "failed" in before:
                continue
            print(f"... round {number + 1} of {ROUNDS}: {name}", file=sys.stderr)
            now = measure(name, path)
            seconds = [each["seconds"] for each in (before, now) if "seconds" in each]
            found[name] = {**now, **({"seconds": min(seconds)} if seconds else {})}
    if "missing" not in found["fakegpu"]:
        found["fakegpu"]["small_card"] = measure("fakegpu-small", path)["small_card"]
    return found


def figures(
    peer: Peer, found: dict[str, Any], truth: dict[str, Any], cpu_s: float
) -> list[str]:
    """Return the line of a table with a tool's figures in bytes and its cost."""
    reason = found.get("missing") or found.get("failed")
    if reason:
        return [peer.title, f"not run: {reason}"]
    bytes_said = (
        difference(found[step], truth[step]) if step in found else "no figure"
        for step in ("load_bytes", "forward_bytes", "reserved_bytes")
    )
    title = f"{peer.title} {version(peer.package)}".strip()
    return [title, peer.way, *bytes_said, f"{found['seconds'] / cpu_s:.2f}"]


def manners(peer: Peer, found: dict[str, Any], truth: dict[str, Any]) -> list[str]:
    """Return the line of a table that says how a tool runs the unchanged task."""
    if "missing" in found or "failed" in found:
        return [peer.title, "not run"]
    error = found.get("unmodified")
    return [
        peer.title,
        f"`{error[:SHOWN]}`" if error else "not tried" if error is None else "runs",
        small_card(found, truth),
        "yes" if peer.injects else "no",
    ]


def show(head: list[str], rows: list[list[str]]) -> None:
    """Print a table, in Markdown."""
    for line in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join([*line, *[''] * (len(head) - len(line))])} |")
    print()


def difference(said: int, true: int) -> str:
    """Return bytes and how far they are from the truth."""
    percent = 100 * (said - true) / true
    return f"{said:,} ({percent:+.2f} %)" if said != true else f"{said:,} (equal)"


def small_card(found: dict[str, Any], truth: dict[str, Any]) -> str:
    """Return how the move to a card too small ends."""
    text = found.get("small_card", "")
    if text == f"OutOfMemoryError: {truth['oom']}":
        return "`OutOfMemoryError`, the recorded text"
    return f"`{text.partition(':')[0]}`, a text of its own" if text else "has no cards"


def version(package: str) -> str:
    """Return a package's version; empty if it is not installed as one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Print the tables, in Markdown."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = str(make_checkpoint("bert-large"))
    truth, found = recorded(), all_rounds(path)
    cpu_s = found["cpu"]["seconds"]
    print(
        f"Recorded: {truth['load_bytes']:,} bytes after the load, "
        f"{truth['forward_bytes']:,} at the forward's peak "
        f"({format_size(truth['forward_bytes'])}), {truth['reserved_bytes']:,} reserved. "
        f"On the CPU the task takes {cpu_s:.2f} s of processor time.\n"
    )
    show(
        [
            "tool",
            "runs",
            "after the load",
            "the forward's peak",
            "peak reserved",
            "time / CPU",
        ],
        [figures(peer, found[peer.name], truth, cpu_s) for peer in PEERS],
    )
    show(
        [
            "tool",
            "the unchanged task",
            "on a card that is too small",
            "can fail a chosen allocation",
        ],
        [manners(peer, found[peer.name], truth) for peer in PEERS],
    )


if __name__ == "__main__":
    main()
