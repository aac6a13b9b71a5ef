"""Two runs of one suite: on PyTorch's own CUDA code, and on the simulated card."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

from substitute import environment

SUITES: Final = Path(__file__).with_name("suites")
#: One card on both sides: bytes, compute capability, multiprocessors, context.
_REAL: Final = {
    "CUDA_HOST_DEVICES": "2",
    "CUDA_HOST_TOTAL": "16G",
    "CUDA_HOST_CC": "8.0",
    "CUDA_HOST_SMS": "108",
    "CUDA_HOST_NAME": "Simulated GPU 16 GiB",
    "CUDA_HOST_CONTEXT": "300M",
    # Every value is read as zero, and no memory of the host's is needed.
    "CUDA_HOST_VALUES": "none",
}
_SIMULATED: Final = (
    "--gpu-backend=simulated",
    "--gpu-card=16GiB,cc=8.0,sms=108,ctx=300MiB*2",
)
#: What two runs differ in: time, names, the host's memory, samples taken in a thread, and
#: the timeline, which is compared by itself: autograd's threads show no Python code on a
#: real card. Nor does a real card tell workspaces from activations, or what is reserved at
#: the moment of a peak.
_OWN: Final = frozenset(
    {
        "seconds",
        "waited_s",
        "environment",
        "host",
        "timeline",
        "kinds",
        "peak_host_bytes",
        "peak_card_bytes",
        "peak_activations_bytes",
        "peak_fragmented_bytes",
    }
)


class Run(NamedTuple):
    """What one run of pytest left.

    Attributes:
        code: Its exit code.
        text: What it printed.
        folder: Where it ran.
        tests: Its JSON report's tests by node id, without what is each device's own.
        timelines: Their timelines, of those that have one.
        baseline: What the report says of the baseline, likewise.
    """

    code: int
    text: str
    folder: Path
    tests: dict[str, Any]
    timelines: dict[str, Any]
    baseline: Any


def run(suite: str, backend: str, folder: Path, *options: str, **variables: str) -> Run:
    """Run a suite on one device.

    Args:
        suite: A file of ``suites/``.
        backend: ``"cuda"`` (on the substitute runtime) or ``"simulated"``.
        folder: An empty one, or one in which the suite has run.
        options: More options of pytest's.
        variables: More of the environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    shutil.copy(SUITES / suite, folder)
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    if backend == "cuda":
        environ = environment(Path(os.environ["CUDA_HOST_BUILD"])) | _REAL
        environ["CUDA_HOST_STATE"] = str(folder / "cards")
        chosen: tuple[str, ...] = ("--gpu-backend=cuda",)
    else:
        environ = {
            key: value for key, value in os.environ.items() if key != "LD_PRELOAD"
        }
        chosen = _SIMULATED
    # The suites are small: threads would only wait for each other.
    environ |= {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", suite, *chosen]
    done = subprocess.run(
        [*command, f"--gpu-report=json:{report}", *options],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    text = done.stdout + done.stderr
    assert report.is_file(), text
    document = json.loads(report.read_text(encoding="utf-8"))
    tests = {each["nodeid"]: _comparable(each) for each in document["tests"]}
    timelines = {
        each["nodeid"].partition("::")[2]: each["timeline"]
        for each in document["tests"]
        if each.get("timeline")
    }
    baseline = _comparable(document["baseline"])
    return Run(done.returncode, text, folder, tests, timelines, baseline)


def _comparable(value: Any) -> Any:
    """Return a part of a report without what two runs may differ in."""
    if isinstance(value, dict):
        left_out = _OWN | _of_a_broken_limit(value)
        return {k: _comparable(v) for k, v in value.items() if k not in left_out}
    if isinstance(value, list):
        return [_comparable(each) for each in value]
    if isinstance(value, str):
        if value.endswith(".pickle"):
            return Path(value).name
        return re.sub(r"\b([Pp])rocess \d+", r"\1rocess N", value)
    return value


def _of_a_broken_limit(test: dict[str, Any]) -> frozenset[str]:
    """Return what says when a limit was broken: only a simulated card shows the moment."""
    if re.match(r"the limit of .* was broken", test.get("incident") or ""):
        return frozenset({"incident", "site", "snapshot"})
    return frozenset()


def differences(real: Any, simulated: Any, where: str = "") -> list[str]:
    """Return every place in which two reports differ, as ``path: real, simulated``."""
    if isinstance(real, dict) and isinstance(simulated, dict):
        keys = sorted(real.keys() | simulated.keys())
        pairs = [(key, real.get(key), simulated.get(key)) for key in keys]
    elif (
        isinstance(real, list)
        and isinstance(simulated, list)
        and len(real) == len(simulated)
    ):
        pairs = [
            (str(i), *both) for i, both in enumerate(zip(real, simulated, strict=False))
        ]
    elif real == simulated:
        return []
    else:
        return [f"{where}: {real!r}, simulated {simulated!r}"]
    return [each for key, a, b in pairs for each in differences(a, b, f"{where}/{key}")]
