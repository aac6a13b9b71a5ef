"""Kill workers with SIGKILL at random moments, and look for what is lost or left.

Run: ``python benchmarks/kill_workers.py [--rounds 50] [--tests 500] [--seed 0]``. Every
round runs a suite on one simulated card and kills a worker every now and then. It then
holds the run to this: it ends; every test has a result; every test that had ended before a
kill has passed, and each kill costs one test at most; no lock, claim or folder is left.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path

WORKERS = 3
#: Seconds after which a run counts as hanging.
PATIENCE_S = 600
CONFTEST = """
import os
from pathlib import Path

HERE = Path(__file__).parent

def pytest_sessionstart(session):
    if hasattr(session.config, "workerinput"):
        (HERE / "pids" / str(os.getpid())).touch()

def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        (HERE / "pids" / str(os.getpid())).unlink()

def pytest_runtest_logfinish(nodeid):
    if "PYTEST_XDIST_WORKER" in os.environ:
        with open(HERE / "ended", "a") as file:
            file.write(nodeid.partition("::")[2] + "\\n")
"""
SUITE = """
import pytest
import torch

@pytest.mark.parametrize("number", range({tests}))
@pytest.mark.requires_vram("6GiB")
def test_a(number):
    torch.empty(6 * 2**30, dtype=torch.uint8, device="cuda")
"""


def kill_now_and_then(
    run: subprocess.Popen[bytes], folder: Path, moments: list[int]
) -> int:
    """Kill a worker each time that so many tests have ended; return how many."""
    done = 0
    end = time.monotonic() + PATIENCE_S
    pids, ended = folder / "pids", folder / "ended"
    while run.poll() is None:
        if time.monotonic() > end:
            run.kill()
            raise SystemExit("the run hangs")
        time.sleep(random.uniform(0.001, 0.05))  # noqa: S311  # not for security
        count = len(ended.read_text().split()) if ended.exists() else 0
        living = [int(path.name) for path in pids.iterdir()]
        if living and moments and count >= moments[0]:
            del moments[0]
            pid = random.choice(living)  # noqa: S311  # not for security
            (pids / str(pid)).unlink(missing_ok=True)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                done += 1
    return done


def play(tests: int, kills: int) -> str:
    """Run one round; return a summary, or end the program with the error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pids").mkdir()
        (folder / "conftest.py").write_text(CONFTEST, encoding="utf-8")
        (folder / "test_a.py").write_text(SUITE.format(tests=tests), encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        tenancy = folder / "tenancy"
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(WORKERS)]
        command += ["--max-worker-restart=100", "--junitxml=junit.xml", "--tb=line"]
        command += ["--gpu-card=16GiB", "--gpu-values=none", "--gpu-backend=simulated"]
        run = subprocess.Popen(  # our own program
            command,
            cwd=folder,
            env={**os.environ, "PYTEST_GPUMEM_TENANCY": str(tenancy)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        # The first one while workers begin, the others while tests run.
        moments = [0, *sorted(random.sample(range(tests), kills - 1))]
        killed = kill_now_and_then(run, folder, moments)
        output = run.stdout.read().decode() if run.stdout else ""
        cases = ET.parse(folder / "junit.xml").iter("testcase")  # noqa: S314  # the file is our own
        outcomes: dict[str, list[bool]] = {}
        for case in cases:
            bad = case.find("failure") is not None or case.find("error") is not None
            key = str(case.get("name")).rpartition("::")[2]
            outcomes.setdefault(key, []).append(not bad)
        ended = (folder / "ended").read_text(encoding="utf-8").split()
        missing = tests - len(outcomes)
        failed = sum(not all(each) for each in outcomes.values())
        lost = [name for name in set(ended) if not any(outcomes.get(name, [False]))]
        left = [str(path) for path in tenancy.rglob("*") if path.is_file()]
        wrong = {
            "without a result": missing,
            "failed beyond one for each kill": max(failed - killed, 0),
            "ended, yet not passed": max(len(lost) - killed, 0),
            "files left": len(left),
        }
    if any(wrong.values()):
        raise SystemExit(f"{wrong}\n{lost}\n{left}\n{output}")
    return f"{killed} kills, {len(outcomes)} results, {failed} of killed workers"


def main() -> None:
    """Play the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    for number in range(options.rounds):
        started_s = time.perf_counter()
        text = play(options.tests, options.kills)
        seconds = time.perf_counter() - started_s
        print(f"round {number + 1}: {text}, {seconds:.0f} s", flush=True)
    print(
        f"{options.rounds} rounds of {options.tests} tests: nothing lost, nothing left"
    )


if __name__ == "__main__":
    main()
