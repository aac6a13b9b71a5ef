"""Compare each figure of the simulated card with the recorded one.

Run: ``python benchmarks/accuracy.py [--write | --check]``. It prints the page
``docs/accuracy.md``, writes it, or says whether it is up to date. It takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests/support"), str(ROOT / "docs")]

from generators.markdown import page, table  # noqa: E402  # after sys.path is set
from recorded_cases import CASES, RECORDINGS, simulate  # noqa: E402  # after sys.path is set

from pytest_gpumem import format_size, make_checkpoint  # noqa: E402  # after sys.path is set
from pytest_gpumem.allocator.replay import replay  # noqa: E402  # after sys.path is set

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = ROOT / "docs" / "accuracy.md"
SHOWN: Final = ("peak_allocated", "peak_reserved")


class Count(NamedTuple):
    """How many figures were compared.

    Attributes:
        all: The number of compared figures.
        equal: How many of them equal the recorded ones.
        worst: The largest difference of the others, in percent.
    """

    all: int = 0
    equal: int = 0
    worst: float = 0.0

    def add(self, recorded: float, simulated: float) -> Count:
        """Return the count with one figure more."""
        error = 100 * abs(simulated - recorded) / max(abs(recorded), 1)
        is_equal = recorded == simulated
        return Count(self.all + 1, self.equal + is_equal, max(self.worst, error))

    @property
    def text(self) -> str:
        """The count as the end of a sentence."""
        if self.equal == self.all:
            return f"{self.all:,} figures, all equal"
        return (
            f"{self.all:,} figures, {self.equal:,} equal, the others up to "
            f"{self.worst:.2f} % off"
        )


def traces() -> Iterator[tuple[str, ...]]:
    """Yield a line for each allocation trace."""
    for path in sorted((RECORDINGS / "traces").glob("*.json")):
        print(f"... {path.name}", file=sys.stderr)
        trace = json.loads(path.read_text(encoding="utf-8"))
        answer = replay(trace)
        count = Count()
        for recorded, simulated in zip(trace["rows"], answer.rows, strict=True):
            for one, other in zip(recorded, simulated, strict=True):
                count = count.add(one or 0, other or 0)
        meta = trace["meta"]
        yield (
            path.stem,
            f"`{meta['conf']}`" if meta["conf"] else "default",
            format_size(meta["total_bytes"]),
            _part(count.equal, count.all),
            _same(trace["oom"], answer.oom),
            _same(trace["driver"], answer.driver),
            _same(trace["snapshots"], answer.snapshots),
        )


def _same(recorded: dict[str, Any], simulated: dict[str, Any]) -> str:
    keys = recorded.keys() | simulated.keys()
    same = sum(recorded.get(key) == simulated.get(key) for key in keys)
    return _part(same, len(keys))


def _part(same: int, of: int) -> str:
    return f"all {of:,}" if same == of else f"{same:,} of {of:,}"


def heading(settings: dict[str, Any]) -> str:
    """Return what a case did, in words."""
    load = {"to": '`.to("cuda")`', "device_map": '`device_map="cuda:0"`'}
    use = {
        "load": "load",
        "infer": "two forwards of 8 x 128",
        "train": "three steps of AdamW",
    }
    words = [use[settings["phase"]], settings["dtype"], load[settings["load"]]]
    if "attn" in settings:
        words.append(f"{settings['attn']} attention")
    if settings.get("mask") == "none":
        words.append("no mask")
    total = settings.get("total", "16G")
    size = format_size(total) if isinstance(total, int) else f"{total[:-1]} GiB"
    return f"{', '.join(words)}; a card of {size}, cc {settings.get('cc', '8.0')}"


def compare(case: dict[str, Any], seen: dict[str, Any]) -> tuple[Count, list[str]]:
    """Return how many figures of a case are equal, and the case's part of the page."""
    count, rows = Count(), []
    ends = []
    for phase, figures in seen.items():
        recorded = case["result"].get(phase)
        if isinstance(figures, str):
            # Recorded errors have the traceback's end too.
            is_same = isinstance(recorded, str) and recorded.startswith(figures)
            ends.append(
                f"It ends with {'the recorded' if is_same else 'another'} error: "
                f"`{figures[:72]}…`"
            )
            continue
        for name, value in figures.items():
            count = count.add(recorded[name], value)
        cells = [phase.replace("_", " ")]
        for name in SHOWN:
            difference = figures[name] - recorded[name]
            cells += [f"{recorded[name]:,}", f"{figures[name]:,}", f"{difference:+,}"]
        rows.append([cell.replace("+0", "0") for cell in cells])
    head = ["after"]
    for name in ("allocated", "reserved"):
        head += [f"peak {name}, recorded", "simulated", "difference"]
    title = heading(case["case"])
    parts = [
        f"**{title[0].upper()}{title[1:]}**" + (f": {count.text}." if rows else "")
    ]
    if rows:
        parts.append(table(head, rows))
    return count, [*parts, *ends]


def render() -> str:
    """Return the page."""
    lines = list(traces())
    path = make_checkpoint("bert-large")
    total, parts = Count(), []
    for number, case in enumerate(CASES):
        print(f"... bert-large {number + 1} of {len(CASES)}", file=sys.stderr)
        count, part = compare(case, simulate(path, case))
        parts += part
        total = Count(
            total.all + count.all,
            total.equal + count.equal,
            max(total.worst, count.worst),
        )
    return page(
        [
            "# Accuracy, figure by figure",
            "Made by `python benchmarks/accuracy.py --write`, which runs each recorded "
            "case on the simulated card. [What the recordings are](exactness.md): "
            "PyTorch's own allocator, torch 2.13.0+cu130, without a card. Bytes.",
            "## Allocation traces",
            "Random allocations and frees. How many are the recorded ones, to the byte and "
            "to the letter: 29 figures after each event, texts of OOMs, events with calls "
            "of the driver, snapshots.",
            table(
                (
                    "trace",
                    "settings",
                    "card",
                    "figures",
                    "OOMs",
                    "driver",
                    "snapshots",
                ),
                lines,
            ),
            "## bert-large",
            f"{len(CASES)} cases: {total.text}. Each phase has six: allocated, reserved, "
            "their peaks, requested, segments. The peaks:",
            *parts,
        ]
    )


def main() -> int:
    """Print the page, write it, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="check that the page is up to date"
    )
    parser.add_argument("--write", action="store_true", help="write the page")
    asked = parser.parse_args()
    text = render()
    if asked.check:
        is_same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print(
            "up to date" if is_same else f"{PAGE.name} is out of date; run with --write"
        )
        return int(not is_same)
    if asked.write:
        PAGE.write_text(text, encoding="utf-8")
        print(f"written: {PAGE.name}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
