"""The simulated card asks its allocator for what PyTorch's own CUDA code asks for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import recorded_requests
import torch
from allocator_requests import kept, peaks
from recorded_requests import (
    DIFFERING,
    FOLDER,
    ROOMS,
    Comparison,
    Outcome,
    compare,
    compare_groups,
    load,
)

#: Of a room's groups, one in so many is tried; all are by ``benchmarks/exactness.py``.
SHARE = {
    "operators": 15,
    "sizes": 24,
    "layouts": 12,
    "attention": 24,
    "modules": 12,
    "optimizers": 12,
    "training": 15,
    "models": 15,
    "uses": 15,
}
KNOWN: dict[str, dict[str, list[Any]]] = json.loads(DIFFERING.read_text("utf-8"))


def test_every_room_is_recorded_and_no_other() -> None:
    """What is recorded is compared, and the other way round."""
    assert {f"{room}.json.xz" for room in ROOMS} == {
        path.name for path in FOLDER.glob("*.xz")
    }
    assert set(ROOMS) == set(KNOWN)


def _number(name: str) -> int:
    return zlib.crc32(name.encode())


def test_a_sample_of_what_is_asked_for() -> None:
    """Of each room; no worse than the list says, which leaves the rest the same."""
    assert {} == _worse(list(ROOMS), part=6)


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_what_is_asked_for(room: str) -> None:
    """No worse than the list says; what is not on it is the same, request by request."""
    assert {} == _worse([room])


def _worse(rooms: list[str], part: int = 1) -> dict[str, Any]:
    """Return what of some rooms' shares is worse than the list says.

    In a process of its own: nothing that other tests have left in torch counts.

    Args:
        rooms: The rooms.
        part: One in so many groups of a share is tried.
    """
    for room in rooms:
        version, _recorded = load(room)
        if torch.__version__.partition("+")[0] != version.partition("+")[0]:
            pytest.skip(f"recorded with torch {version}")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environ["PYTHONPATH"] = str(Path(recorded_requests.__file__).parent)
    code = (
        f"import test_recorded_requests as tests; tests.tell_worse({rooms!r}, {part})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tell_worse(rooms: list[str], part: int) -> None:
    """Print what of some rooms' shares is worse than the list says."""
    worse = {}
    for room in rooms:
        share = SHARE[room] * part

        def is_wanted(name: str, share: int = share) -> bool:
            return not _number(name) % share

        for name, each in compare_groups(room, load(room)[1], is_wanted):
            if each.verdict != "unrecorded" and _known(room, name).rank < each.rank:
                worse[f"{room}: {name}"] = each.verdict
    sys.stdout.write(json.dumps(worse))


def _known(room: str, name: str) -> Comparison:
    verdict, error = KNOWN[room].get(name, ("same", 0.0))
    return Comparison(verdict, error + 1e-4)


def test_figures_of_requests() -> None:
    """Peaks are of rounded blocks; what is kept is what a phase does not give back."""
    phases = {"forward": [100, 600, -1, 512], "backward": [0, 2000, -2, -3, 100, -4]}

    assert {"forward": 512 + 1024, "backward": 2048} == peaks(phases)
    assert [600, 512] == kept(phases["forward"])


@pytest.mark.parametrize(
    ("here", "verdict"),
    [
        ([100, -1, 200], "same"),
        ([200, 100, -2], "differs"),
        ([100, -1, 100, -2, 200], "peaks"),
        ([100, -1, 1000], "differs"),
        ([100, -1], "peaks"),
    ],
)
def test_a_comparison(here: list[int], verdict: str) -> None:
    """The order and the sizes count, and so does the peak."""
    recorded = Outcome(1, {"forward": [100, -1, 200]})

    assert verdict == compare(recorded, Outcome(1, {"forward": here})).verdict
