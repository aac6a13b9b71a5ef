"""Runs tests in processes of their own, for ``gpu_isolated``.

Note [A fresh process for a test]
A forked process would be cheaper, but it cannot use PyTorch if its parent has used it:
CUDA cannot be initialised again (``torch/cuda/__init__.py``, ``_lazy_init``), and
autograd refuses to run a backward (``torch/csrc/autograd/engine.cpp``,
``in_bad_autograd_fork``). It would also inherit the caches of libraries from earlier
tests. So a new interpreter runs pytest with the same command line. It collects only the
test's file and runs only the test, with the fixtures of all scopes. It sends its
reports as pytest-xdist's workers do, so the test's record, its tracebacks and its
output come with them.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.inheritance import CHILDREN_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.plugin.marks import MarkersByTest
    from pytest_gpumem.plugin.phases import Phases
    from pytest_gpumem.plugin.session import Run

#: The options that a test's own process does not take over, and their values there.
_OPTIONS: Final[dict[str, Any]] = {
    "dist": "no",
    "tx": [],
    "numprocesses": None,
    "maxprocesses": None,
    "looponfail": False,
    "xmlpath": None,
    "lf": False,
    "failedfirst": False,
    "newfirst": False,
    "stepwise": False,
    "stepwise_skip": False,
    "cacheclear": False,
    "cacheshow": None,
}
#: The code of the new interpreter. It runs a file that is not imported as a module, so that
#: pytest still imports the whole package as a plugin.
_RUN: Final = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
#: The most lines of the process's own output that a failure shows: the first and the last.
#: Python's faulthandler begins with the innermost line.
_LINES: Final = (20, 10)


class Isolation:
    """The further data that a test's process gets and sends; kept in its config.

    Attributes:
        workers: The number of the run's workers of pytest-xdist.
        notes: Functions that return the notes for the run, by name.
    """

    def __init__(self, workers: int) -> None:
        self.workers: Final = workers
        self.notes: Final[dict[str, Any]] = {}


#: The key of the process's ``Isolation``; other processes have none.
ISOLATION: Final = pytest.StashKey[Isolation]()


def refuse_debuggers(item: pytest.Item) -> None:
    """Refuse ``--pdb`` and ``--trace`` for a test that runs in another process.

    Raises:
        pytest.UsageError: One of them is given.
    """
    for flag, name in (("--pdb", "usepdb"), ("--trace", "trace")):
        if item.config.getoption(name, default=False):
            raise pytest.UsageError(
                f"{item.nodeid}: @pytest.mark.gpu_isolated: {flag} cannot reach the "
                "process of the test; take the marker off to debug it"
            )


class Isolated:
    """Runs marked tests in new processes, one after the other.

    Args:
        run: The run.
        phases: The hooks around tests; they count the allocations that rules made fail.
        markers: The arguments of each test's markers.
    """

    def __init__(self, run: Run, phases: Phases, markers: MarkersByTest) -> None:
        self._run: Final = run
        self._phases: Final = phases
        self._markers: Final = markers
        self._count = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Run a marked test in a process of its own."""
        shows_setup = item.config.getoption("setupshow", default=False)
        if not self._markers[item].is_isolated or shows_setup:
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item, nextitem):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Iterator[pytest.TestReport]:
        """Yield the reports of the test's process; an error report if it ended early."""
        import tempfile

        if self._run.device is not None:
            self._phases.clean(self._run.device)  # before the new process uses the card
        with tempfile.TemporaryDirectory(prefix="gpumem-isolated-") as folder:
            try:
                status, output = self._start(item, Path(folder))
                broken = f"the process of this test {_ending(status)}\n{output}"
            except pytest.fail.Exception as error:  # another plugin's time limit
                broken = f"{error}"
            sent = list(_read(Path(folder) / "reports"))
        is_whole = False
        for each in sent:
            if "$report_type" not in each:
                self._take(each)
                continue
            hook = item.config.hook
            report = hook.pytest_report_from_serializable(config=item.config, data=each)
            is_whole = is_whole or report.when == "teardown"
            yield report
        if not is_whole:
            yield _report(item, "call", "failed", broken.rstrip())
        # Fixtures of wider scope that the next test does not use end here.
        state = item.session._setupstate  # noqa: SLF001  # no public name
        ending = pytest.CallInfo.from_call(
            lambda: state.teardown_exact(nextitem),
            when="teardown",
            reraise=(pytest.exit.Exception, KeyboardInterrupt),
        )
        if ending.excinfo is not None:
            yield pytest.TestReport.from_item_and_call(item, ending)
        elif not is_whole:
            yield _report(item, "teardown", "passed", None)

    def _start(self, item: pytest.Item, folder: Path) -> tuple[int, str]:
        """Run a test's process; return its exit status and the end of its output."""
        import subprocess

        config = item.config
        self._count += 1
        request = {
            "nodeid": item.nodeid,
            "path": str(item.path),
            "arguments": [str(each) for each in config.invocation_params.args],
            "sys_path": list(sys.path),
            "options": {**_OPTIONS, **_own_folder(config, self._count)},
            "workers": getattr(config, "workerinput", {}).get("workercount", 1),
            "reports": str(folder / "reports"),
        }
        file = folder / "request"
        file.write_text(json.dumps(request), "utf-8")
        environment = {
            name: value
            for name, value in os.environ.items()
            if name != CHILDREN_VARIABLE and not name.startswith("PYTEST_XDIST_")
        }
        script = Path(__file__).with_name("isolated_run.py")
        command = [sys.executable, "-c", _RUN, str(script), str(file)]
        shows = config.getoption("capture", default="") == "no"
        with (folder / "output").open("w+b") as output:
            target = None if shows else output
            with subprocess.Popen(  # noqa: S603  # this interpreter, our own script
                command,
                cwd=config.invocation_params.dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
            ) as process:
                try:
                    status = process.wait()
                except BaseException:
                    process.kill()
                    raise
            output.seek(0)
            lines = output.read().decode(errors="replace").splitlines()
        first, last = _LINES
        if len(lines) > first + last:
            lines = [*lines[:first], "...", *lines[-last:]]
        return status, "\n".join(lines)

    def _take(self, notes: dict[str, Any]) -> None:
        for rule, count in notes.get("rules", {}).items():
            self._phases.rule_counts[rule] += count


def _own_folder(config: pytest.Config, number: int) -> dict[str, str]:
    """Return the option for temporary folders: a folder inside this run's folder."""
    factory = getattr(config, "_tmp_path_factory", None)
    if factory is None:
        return {}
    return {"basetemp": str(factory.getbasetemp() / f"isolated{number}")}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that a process has sent, even if it ended in the middle of one."""
    if not path.exists():
        return
    with path.open(encoding="ascii") as lines, suppress(ValueError):
        for line in lines:
            yield json.loads(line, object_hook=_with_tuples)


def _with_tuples(found: dict[str, Any]) -> Any:
    """Return a value with its tuples restored; see ``isolated_run.plain``."""
    return tuple(found["()"]) if found.keys() == {"()"} else found


def _ending(status: int) -> str:
    if status < 0:
        return f"was ended by signal {-status}"
    return f"ended before the test did, with exit code {status}"


def _report(
    item: pytest.Item, when: Any, outcome: Any, text: str | None
) -> pytest.TestReport:
    keywords: dict[str, Any] = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, outcome, text, when)
