"""Record what PyTorch's own CUDA code says about calls that it refuses.

    python tests/cuda_host/record_refusals.py FOLDER [--write]

FOLDER gets the substitute CUDA runtime, if it is not there yet. Without ``--write``
what is found is compared with ``refusals.json.xz`` and ``misplaced.json.xz`` of
``tests/recordings``.
"""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "support"))

import misplaced_calls
import wrong_calls
from substitute import environment

#: What only a library of CUDA's can do, for which the substitute runtime has no other.
_ABSENT = ("cuDNN error", "cuFFT error", "libcuda.so")


def _found(folder: Path, what: str, devices: int) -> Any:
    """Return what a process on the substitute says."""
    out = subprocess.run(
        [sys.executable, __file__, what],
        env=environment(folder)
        | {"CUDA_HOST_DEVICES": str(devices), "CUDA_HOST_VALUES": "none"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(out.splitlines()[-1])  # CUDA's libraries print as well


def _refusals(folder: Path) -> dict[str, dict[str, str]]:
    found = _found(folder, "refusals", 1)
    return {
        body: {
            name: text
            for name, text in said.items()
            if not any(absent in text for absent in _ABSENT)
        }
        for body, said in found.items()
    }


def _misplaced(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    runs = [_found(folder, "misplaced", 2) for _run in range(2)]
    return {"calls": misplaced_calls.comparable(*runs)}


def _write(path: Path, found: dict[str, Any]) -> None:
    import torch

    version = torch.__version__.partition("+")[0]
    partial = path.with_suffix(".new")
    with lzma.open(partial, "wt", encoding="utf-8") as file:
        json.dump({"torch": version, **found}, file, indent=0)
    partial.replace(path)


def _compare(known: dict[str, str], found: dict[str, str]) -> bool:
    """Print what differs, and return whether anything does."""
    different = [name for name in known | found if known.get(name) != found.get(name)]
    for name in different:
        print(f"{name}\n  recorded {known.get(name)}\n  found    {found.get(name)}")
    return bool(different)


def _flat(calls: dict[str, dict[str, str]]) -> dict[str, str]:
    return {
        f"{name} {key}": text
        for name, said in calls.items()
        for key, text in said.items()
    }


def main(arguments: list[str]) -> int:
    """Run the calls on the substitute, and write or compare what was said."""
    if arguments == ["refusals"]:
        calls = wrong_calls.said_of_calls()
        types = wrong_calls.said_of_types(lambda _name: True)
        print(json.dumps({"calls": calls, "types": types}))
        return 0
    if arguments == ["misplaced"]:
        names = misplaced_calls.operators()
        print(json.dumps({name: misplaced_calls.said_of(name) for name in names}))
        return 0
    folder, *options = arguments
    refusals, misplaced = _refusals(Path(folder)), _misplaced(Path(folder))
    if "--write" in options:
        _write(wrong_calls.RECORDED, refusals)
        _write(misplaced_calls.RECORDED, misplaced)
        return 0
    _version, calls, types = wrong_calls.load()
    _version, places = misplaced_calls.load()
    differs = _compare(calls | types, refusals["calls"] | refusals["types"])
    return int(_compare(_flat(places), _flat(misplaced["calls"])) or differs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
