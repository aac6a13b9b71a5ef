"""Run other projects' tests, as they are, on the host and on simulated cards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from suites import Suite

HERE: Final = Path(__file__).parent
#: The longest that one test may take, in seconds, and how much later its process is
#: killed: a test that waits in C++ hears no alarm.
LIMIT_S: Final = 900.0
GRACE_S: Final = 30.0
#: The longest until the first test of a process begins, in seconds.
START_S: Final = 900.0
#: How often a run goes on after a process that died or was killed.
RESTARTS: Final = 40


class Setting(NamedTuple):
    """Where tests run.

    Attributes:
        name: ``host``, without the plugin, or the number of cards.
        options: What pytest gets for it.
    """

    name: str
    options: tuple[str, ...]


#: Small enough for the host to hold the values of tests that fill a card.
CARD: Final = "8GiB,cc=8.0"
HOST, ONE, TWO = "host", "one card", "two cards"
SETTINGS: Final = (
    Setting(HOST, ("-p", "no:gpumem")),
    Setting(ONE, ("--gpu-backend=simulated", f"--gpu-card={CARD}")),
    Setting(TWO, ("--gpu-backend=simulated", f"--gpu-card={CARD}*2")),
)


class Outcome(NamedTuple):
    """What became of one test.

    Attributes:
        outcome: ``passed``, ``skipped``, ``failed``, ``xfailed`` or ``died``.
        chain: The errors behind it: class and text of each.
        where: File and line of the innermost frame.
        seconds: How long it took.
        allocations: How often it asked the cards for bytes, in its own process.
    """

    outcome: str
    chain: tuple[tuple[str, str], ...] = ()
    where: str = ""
    seconds: float = 0.0
    allocations: int = 0


def read(file: Path) -> dict[str, Outcome]:
    """Return the outcomes of a file that the plugin ``outcomes`` has written."""
    found: dict[str, Outcome] = {}
    if not file.exists():
        return found
    for text in file.read_text(encoding="utf-8").splitlines():
        line: dict[str, Any] = json.loads(text)
        if line["outcome"] == "begun":
            # It stays so if nothing follows: the process has died in it.
            found[line["test"]] = Outcome("died")
            continue
        chain = [(kind, words) for kind, words in line["chain"]]
        if line.get("subtests"):
            chain.insert(0, ("Subtest", line["subtests"]))
        found[line["test"]] = Outcome(
            line["outcome"],
            tuple(chain),
            line.get("where", ""),
            line.get("seconds", 0.0),
            line.get("allocations", 0),
        )
    return found


def _environment(suite: Suite, file: Path, home: Path) -> dict[str, str]:
    own = {
        "PYTHONPATH": os.pathsep.join(
            [
                str(HERE),
                *(str(home / each) for each in suite.paths),
                *filter(None, [os.environ.get("PYTHONPATH")]),
            ]
        ),
        "UPSTREAM_OUTCOMES": str(file),
        "UPSTREAM_LIMIT_S": str(LIMIT_S),
        "UPSTREAM_EVERY": str(suite.every),
        # Tests start the programs that lie beside this Python.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        # No test reaches the network, and none waits for it.
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **own, **suite.environment}


def _wait(process: subprocess.Popen[bytes], file: Path) -> None:
    """Wait for a process; kill it and its children once a test takes far too long."""
    first = file.stat().st_size if file.exists() else 0
    size, since_s = first, time.monotonic()
    while True:
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            pass
        else:
            return
        now = file.stat().st_size if file.exists() else 0
        if now != size:
            size, since_s = now, time.monotonic()
        elif time.monotonic() - since_s > (
            START_S if now == first else LIMIT_S + GRACE_S
        ):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return


def _file(suite: Suite, setting: str, out: Path) -> Path:
    return out / f"{suite.name}-{setting}.jsonl".replace(" ", "-")


def outcomes(suite: Suite, setting: Setting, out: Path) -> dict[str, Outcome]:
    """Return the outcomes of a suite in one setting that are there."""
    return read(_file(suite, setting.name, out))


def run(
    suite: Suite,
    setting: Setting,
    home: Path,
    out: Path,
    until_s: float = float("inf"),
) -> None:
    """Run a suite's tests in one setting, and again after each process that died.

    Args:
        suite: The tests.
        setting: Where they run.
        home: The folder of the unpacked source.
        out: Where outcomes and output go; outcomes that are there already stand.
        until_s: When no further test begins, as ``time.time`` has it.
    """
    suite.prepare(home)
    out.mkdir(parents=True, exist_ok=True)

    file = _file(suite, setting.name, out)
    log = file.with_suffix(".log")
    environment = _environment(suite, file, home)
    environment["UPSTREAM_UNTIL"] = str(until_s)
    if setting.name != HOST:
        environment["UPSTREAM_HOST"] = str(_file(suite, HOST, out))
    if setting.name == TWO:
        environment["UPSTREAM_SKIPPED"] = str(_file(suite, ONE, out))
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "outcomes"),
        *(
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-o",
            "addopts=",
            "--tb=short",
            "--continue-on-collection-errors",
        ),
        *(("-k", suite.keyword) if suite.keyword else ()),
        *(("-W", suite.ignores) if suite.ignores else ()),
        *setting.options,
    ]

    def start(*files: str, **more: str) -> int | None:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*command, *files],
                cwd=home / suite.folder,
                env=environment | more,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            _wait(process, file)
            # Ranks that a test has started, and that did not end with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode

    if suite.is_alone:
        tests = file.with_suffix(".list")
        start(*suite.files, UPSTREAM_LIST=str(tests))
        for test in tests.read_text(encoding="utf-8").splitlines():
            if time.time() > until_s:
                break
            start(test)
        return
    for _ in range(RESTARTS):
        if time.time() > until_s:
            break
        before = len(read(file))
        ended = start(*suite.files)
        # 0: all passed; 1: some failed; 5: nothing was left to run.
        if ended in {0, 1, 5} or len(read(file)) == before:
            break


def counts(outcomes: Mapping[str, Outcome]) -> dict[str, int]:
    """Return how many tests ended in each way."""
    found: dict[str, int] = {}
    for each in outcomes.values():
        found[each.outcome] = found.get(each.outcome, 0) + 1
    return found
