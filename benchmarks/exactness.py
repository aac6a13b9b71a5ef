"""Compare the simulated card's requests of memory with those of PyTorch's own CUDA code.

Run: ``python benchmarks/exactness.py [--write | --check] [-v] [ROOM ...]``. It compares
every case of ``tests/recordings/requests``, or of the rooms that are named, prints how
many agree, and with ``-v`` what differs. ``--write`` writes the list of what differs,
which the tests hold, and the page ``docs/operators.md`` from it; ``--check`` says
whether they are up to date. It takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

ROOT: Final = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests/support"), str(ROOT / "docs")]

import torch  # noqa: E402  # after sys.path is set
from generators.markdown import page, table  # noqa: E402  # after sys.path is set
from recorded_requests import (  # noqa: E402  # after sys.path is set
    DIFFERING,
    ROOMS,
    VERDICTS,
    Comparison,
    compare_groups,
    load,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = ROOT / "docs" / "operators.md"
#: A peak that differs by no more than this share is near.
NEAR: Final = 0.01
_TITLES: Final = {
    "operators": "operators of `op_db`, up to six samples each",
    "sizes": "common operators at the sizes of models",
    "layouts": "operands and gradients that are not stored by rows",
    "attention": "`scaled_dot_product_attention`",
    "modules": "modules of `module_db`",
    "optimizers": "optimizers of `optim_db`",
    "training": "steps of a training",
    "models": "models of transformers, two training steps",
    "uses": "the same models: words with a cache, SGD, fused, checkpoints, autocast",
}
Found = dict[str, dict[str, Comparison]]


def known() -> Found:
    """Return what the list says of every group that is recorded, by room."""
    listed = json.loads(DIFFERING.read_text("utf-8"))
    found: Found = {}
    for room in ROOMS:
        _version, recorded = load(room)
        found[room] = {}
        for card, groups in recorded.items():
            for group, cases in groups.items():
                name = f"{card}: {group}"
                if name in listed.get(room, {}):
                    found[room][name] = Comparison(*listed[room][name])
                elif cases:
                    is_missing = all(each.error for each in cases.values())
                    verdict = "unrecorded" if is_missing else "same"
                    found[room][name] = Comparison(verdict)
    return found


def listed(found: Found) -> str:
    """Return the list of what differs, as text."""
    content = {
        room: {
            name: [each.verdict, round(each.error, 4)]
            for name, each in groups.items()
            if each.verdict not in {"same", "unrecorded"}
        }
        for room, groups in found.items()
    }
    return json.dumps(content, indent=0) + "\n"


def _part_of(name: str, room: str) -> str:
    """Return the name under which a group is counted: its dtype, or its card."""
    card, _colon, group = name.partition(": ")
    return group.rpartition(" ")[2] if room in {"operators", "modules"} else card


def _rows(found: Found) -> Iterator[list[str]]:
    for room, groups in found.items():
        parts: dict[str, list[Comparison]] = {}
        for name, each in groups.items():
            parts.setdefault(_part_of(name, room), []).append(each)
        for part, inner in parts.items():
            count = Counter(each.verdict for each in inner)
            recorded = len(inner) - count["unrecorded"]
            near = sum(
                each.verdict == "differs" and each.error <= NEAR for each in inner
            )
            numbers = (
                recorded,
                count["same"],
                count["peaks"],
                near,
                count["differs"] - near,
                count["values"],
                count["fails"] + count["unlike"],
                count["unrecorded"],
            )
            yield [_TITLES[room], part, *(f"{each:,}" for each in numbers)]


_LATE_ZEROS: Final = (
    "C++ creates zeros on the tensor's device, which it takes to be the host; they are "
    "copied to the card when the gradient is complete"
)
_EARLY_FREES: Final = (
    "copies of conjugated operands are freed before the end of the formula"
)
#: Why a peak differs by more than ``NEAR``, by operator.
_WHY: Final = {
    "copysign": _LATE_ZEROS,
    "linalg.lu_solve": _EARLY_FREES,
    "linalg.matrix_rank.hermitian": "computed on the host as a whole",
    "linalg.solve_triangular": _EARLY_FREES,
    "lu_solve": _EARLY_FREES,
    "max_pool2d_with_indices_backward": _LATE_ZEROS,
    "nextafter": _LATE_ZEROS,
}


def _unexplained(found: Found) -> list[str]:
    """Return peaks that differ by more than ``NEAR`` without a reason, and unused reasons."""
    far = {
        name.partition(": ")[2].rpartition(" ")[0] or name.partition(": ")[2]
        for groups in found.values()
        for name, each in groups.items()
        if each.verdict == "differs" and each.error > NEAR
    }
    return sorted(far ^ _WHY.keys())


def _listing(found: Found) -> Iterator[list[str]]:
    """Yield what differs, each over its types."""
    for room, groups in found.items():
        kinds: dict[tuple[str, str], list[tuple[str, float]]] = {}
        for name, each in groups.items():
            if each.verdict in {"differs", "fails", "values"}:
                card, _colon, group = name.partition(": ")
                base, _blank, kind = group.rpartition(" ")
                if not base:
                    base, kind = kind, card
                kinds.setdefault((base, each.verdict), []).append((kind, each.error))
        for (base, verdict), inner in sorted(kinds.items()):
            worst = max(error for _kind, error in inner)
            words = sorted({kind for kind, _error in inner})
            much = "" if verdict == "fails" else f"{100 * worst:.1f} %"
            why = _WHY.get(base, "") if verdict == "differs" else ""
            yield [room, f"`{base}`", ", ".join(words), verdict, much, why]


def _shares(found: Found) -> str:
    """Say what share of each room has equal peaks."""
    words = []
    for room, groups in found.items():
        count = Counter(each.verdict for each in groups.values())
        recorded = len(groups) - count["unrecorded"]
        equal = count["same"] + count["peaks"]
        words.append(
            f"{_TITLES[room]}: {equal:,} of {recorded:,} ({equal / recorded:.1%})"
        )
    return "; ".join(words)


def render(found: Found) -> str:
    """Return the page."""
    version, _recorded = load(ROOMS[0])
    missing = {
        name.partition(": ")[2].rpartition(" ")[0]
        for name, each in found["operators"].items()
        if each.verdict == "unrecorded"
    }
    return page(
        [
            "# Exactness, operator by operator",
            "Made by `python benchmarks/exactness.py --write`. What PyTorch's own CUDA "
            f"code (torch {version}) asks of its allocator was recorded on a substitute "
            "of the CUDA runtime, by `python tests/cuda_host/record_requests.py`; the "
            "simulated card runs the same cases. An operator in one type counts once, by "
            "its worst sample, forward and backward. [What this proves](exactness.md).",
            table(
                (
                    "what",
                    "type or card",
                    "recorded",
                    "same requests, in order",
                    "same peaks",
                    "peak within 1 %",
                    "peak differs more",
                    "needs values",
                    "refused",
                    "not recorded",
                ),
                _rows(found),
            ),
            f"Equal peaks: {_shares(found)}.",
            "Samples are small, so one temporary block of 512 bytes is a large share "
            "of a peak. *Needs values*: the code reads a value back from the card. The "
            "substitute computes no values, so the requests after such a read are not "
            "comparable. *Not recorded*: the substitute has no cuSOLVER, cuSPARSE and "
            "MAGMA, and some operators end their process there. Convolutions and "
            "recurrent layers were recorded without cuDNN, which a real card prefers. "
            "The kernels of `torch.cuda.jiterator` are written by the user in CUDA "
            "C++; they run only if no values are kept.",
            "## What differs",
            "By how much a peak differs at most, as a share of the recorded one.",
            table(
                ("room", "what", "types, cards or kinds", "verdict", "error", "why"),
                _listing(found),
            ),
            "## Not recorded",
            ", ".join(f"`{name}`" for name in sorted(missing)) + ".",
        ]
    )


def _asked(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help=", ".join(ROOMS))
    parser.add_argument("--write", action="store_true", help="write the list and page")
    parser.add_argument(
        "--check", action="store_true", help="check that both are up to date"
    )
    parser.add_argument("-v", action="store_true", help="print what differs")
    asked = parser.parse_args(arguments)
    unknown = [each for each in asked.rooms if each not in ROOMS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(ROOMS)}")
    return asked


def main(arguments: list[str]) -> int:
    """Compare, and print, write or check."""
    asked = _asked(arguments)
    torch.set_num_threads(1)
    found = known()
    for room in asked.rooms or ROOMS:
        since = time.monotonic()
        found[room] = dict(compare_groups(room, load(room)[1]))
        count = Counter(each.verdict for each in found[room].values())
        words = ", ".join(f"{name} {count[name]:,}" for name in VERDICTS)
        took = time.monotonic() - since
        print(f"... {room}: {words} ({took:.0f} s)", file=sys.stderr)
        if asked.v:
            for name, each in found[room].items():
                if each.verdict not in {"same", "unrecorded"}:
                    print(f"{room} {name}: {each.verdict} {each.error:.3f} {each.text}")
    texts = {DIFFERING: listed(found), PAGE: render(found)}
    unexplained = _unexplained(found)
    if unexplained:
        print(f"without a reason, or a reason for nothing: {', '.join(unexplained)}")
    if asked.check:
        stale = [each for each in texts if each.read_text("utf-8") != texts[each]]
        names = ", ".join(each.name for each in stale)
        print(f"out of date: {names}; run with --write" if stale else "up to date")
        return int(bool(stale or unexplained))
    if asked.write:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
            print(f"written: {path.name}")
    elif not asked.v:
        print(texts[PAGE])
    return int(bool(unexplained))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
