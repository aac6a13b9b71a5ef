"""Record what PyTorch's own CUDA code asks of its allocator.

    python tests/cuda_host/record_requests.py FOLDER [ROOM...]

FOLDER gets the substitute CUDA runtime, if it is not there yet. The rooms' files are
written to ``tests/recordings/requests``. A case that kills its process is noted, and the
next one runs in a new process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

sys.path.append(str(Path(__file__).parents[1] / "support"))

import torch
from recorded_requests import ROOMS, Outcome, outcome, room_of, save, warm_up
from substitute import environment

#: Seconds that one case may take.
_PATIENCE: Final = 60
#: Cases of one group that may kill their process before the others are left out.
_KILLS: Final = 2


def _run(room: Any, output: Path, start: int, after: str) -> None:
    """Run a room's cases from one on, and write a line before and after each."""
    torch.set_num_threads(1)
    # Not on the substitute.
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    reads = ctypes.CDLL(None).cuda_host_reads
    groups = room.groups()
    warm_up()
    gc.collect()
    gc.freeze()
    with output.open("a", encoding="utf-8") as file:

        def write(*line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for number in range(start, len(groups)):
            write("group", number, groups[number])
            try:
                for case in room.cases(groups[number]):
                    if after:
                        after = "" if after == case.name else after
                        continue
                    write("case", case.name, case.mark)
                    before = reads()
                    # Threads of autograd let go of what they ran a moment later.
                    found = outcome(case, lambda: time.sleep(0.002))
                    write("outcome", case.name, found._replace(reads=reads() - before))
            except Exception as error:  # noqa: BLE001  # its cases cannot be made
                print(f"{groups[number]}: {error!r}", file=sys.stderr)
            torch.cuda.empty_cache()
        write("end")


def _watched(command: list[str], environ: dict[str, str], output: Path) -> str:
    """Run a process until it ends, or writes nothing for too long; say how it ended."""
    process = subprocess.Popen(command, env=environ)
    seen, since = -1, time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        size = output.stat().st_size
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
            process.kill()
            process.wait()
            return "takes too long"
    code = process.returncode
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}"


def _record(
    room: str, build: Path, capability: str, processors: int
) -> dict[str, dict[str, Outcome]]:
    """Record a room's cases on one card, in as many processes as it takes."""
    environ = environment(build) | {
        "CUDA_HOST_CC": capability,
        "CUDA_HOST_SMS": str(processors),
        "CUDA_HOST_TOTAL": "16G",
        "CUDA_HOST_DEVICES": "1",
    }
    found: dict[str, dict[str, Outcome]] = {}
    start, after, kills = 0, "", 0
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "lines"
        while True:
            output.write_text("")
            arguments = ["--child", room, str(output), str(start), after]
            ending = _watched([sys.executable, __file__, *arguments], environ, output)
            group, running = "", None
            lines = [json.loads(each) for each in output.read_text().splitlines()]
            for kind, *values in lines:
                if kind == "group":
                    kills = kills if values[0] == start else 0
                    start, group = values
                    found.setdefault(group, {})
                elif kind == "case":
                    running = values
                elif kind == "outcome":
                    found[group][values[0]] = Outcome(*values[1])
                    running = None
            if running is None:
                if lines and lines[-1] == ["end"]:
                    return found
                raise SystemExit(f"{group}: {ending}")
            after, mark = running
            found[group][after] = Outcome(mark, {}, ending)
            print(f"{group} {after}: {ending}", file=sys.stderr)
            kills += 1
            if kills == _KILLS:
                start, after, kills = start + 1, "", 0


def main(arguments: list[str]) -> None:
    """Record the rooms that are named, or all of them."""
    if arguments[0] == "--child":
        room, output, start, after = arguments[1:]
        _run(room_of(room), Path(output), int(start), after)
        return
    build = Path(arguments[0])
    for name in arguments[1:] or ROOMS:
        recorded = {
            f"cc={capability},sms={processors}": _record(
                name, build, capability, processors
            )
            for capability, processors in room_of(name).CARDS
        }
        print(save(name, recorded))


if __name__ == "__main__":
    main(sys.argv[1:])
