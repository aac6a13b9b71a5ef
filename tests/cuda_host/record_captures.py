"""Record what captures and private pools come to on PyTorch's own CUDA code.

    python tests/cuda_host/record_captures.py FOLDER [--write]

FOLDER gets the substitute CUDA runtime, if it is not there yet. Without ``--write``
what is found is compared with ``tests/recordings/captures.json.xz``, which has a recording
for each of some versions of torch.
"""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "support"))

from captures import RECORDED, TOTAL_BYTES, recordings, run
from substitute import environment
from versions import NAME


def main(arguments: list[str]) -> int:
    """Run the program on the substitute, and write or compare what it tells."""
    if arguments == ["run"]:
        print(json.dumps(run()))
        return 0
    folder, *options = arguments
    settings = {"CUDA_HOST_TOTAL": str(TOTAL_BYTES), "CUDA_HOST_DEVICES": "1"}
    out = subprocess.run(
        [sys.executable, __file__, "run"],
        env=environment(Path(folder)) | {"CUDA_HOST_CONTEXT": "0"} | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    rows = json.loads(out)
    known = recordings()
    if "--write" in options:
        text = json.dumps(known | {NAME: rows}, sort_keys=True)
        partial = RECORDED.with_suffix(".new")
        partial.write_bytes(lzma.compress(text.encode("utf-8")))
        partial.replace(RECORDED)
        return 0
    pairs = zip(rows, known[NAME], strict=True)
    different = [(was, now) for now, was in pairs if was != now]
    for was, now in different:
        print(f"recorded {was}\nfound    {now}")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
