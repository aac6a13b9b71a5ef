"""Record what PyTorch's own CUDA code says about calls that it refuses.

    python tests/cuda_host/record_refusals.py FOLDER [--write]

FOLDER gets the substitute CUDA runtime, if it is not there yet. Without ``--write``
what is found is compared with ``tests/recordings/refusals.json.xz``.
"""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from substitute import environment
from wrong_calls import RECORDED, load, said_of_calls, said_of_types

#: What only a library of CUDA's can do, for which the substitute runtime has no other.
_ABSENT = ("cuDNN error", "cuFFT error", "libcuda.so")


def main(arguments: list[str]) -> int:
    """Run the calls on the substitute, and write or compare what was said."""
    if arguments == ["run"]:
        print(json.dumps([said_of_calls(), said_of_types(lambda _name: True)]))
        return 0
    folder, *options = arguments
    out = subprocess.run(
        [sys.executable, __file__, "run"],
        env=environment(Path(folder)) | {"CUDA_HOST_DEVICES": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    calls, types = (
        {
            name: text
            for name, text in said.items()
            if not any(absent in text for absent in _ABSENT)
        }
        for said in json.loads(out)
    )
    if "--write" in options:
        import torch

        version = torch.__version__.partition("+")[0]
        partial = RECORDED.with_suffix(".new")
        with lzma.open(partial, "wt", encoding="utf-8") as file:
            json.dump(
                {"torch": version, "calls": calls, "types": types}, file, indent=0
            )
        partial.replace(RECORDED)
        return 0
    _version, known_calls, known_types = load()
    known, found = known_calls | known_types, calls | types
    different = [name for name in known | found if known.get(name) != found.get(name)]
    for name in different:
        print(f"{name}\n  recorded {known.get(name)}\n  found    {found.get(name)}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
