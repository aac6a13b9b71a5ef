"""A plugin of pytest: what became of each test, one line of JSON each, as it ends.

It is loaded with ``-p outcomes`` into runs of other projects' tests. A line is written
when a test begins and when it ends, so that the reader knows which test a process died
in. Variables of the environment rule it: ``UPSTREAM_OUTCOMES``, the file it appends
to; ``UPSTREAM_LIMIT_S``, the longest that a test may take, in seconds;
``UPSTREAM_EVERY``: of files with ``MANY`` tests or more, one in so many is run;
``UPSTREAM_UNTIL``, after which no test begins, in seconds of ``time.time``; and
``UPSTREAM_LIST``, if each test is to have a process of its own: no test is run, those that
are not skipped are listed in that file, one line each. A test that has a line in the file
of outcomes when the run begins is not run again.

A test may start this command again, once for each rank. Such a process runs what its
command names, and writes nothing down.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

FILE: Final = Path(os.environ["UPSTREAM_OUTCOMES"])
LIMIT_S: Final = float(os.environ["UPSTREAM_LIMIT_S"])
EVERY: Final = int(os.environ["UPSTREAM_EVERY"])
SKIPPED: Final = os.environ.pop("UPSTREAM_SKIPPED", "")
HOST: Final = os.environ.pop("UPSTREAM_HOST", "")
LIST: Final = os.environ.pop("UPSTREAM_LIST", "")
UNTIL_S: Final = float(os.environ.pop("UPSTREAM_UNTIL", "inf"))
# The ranks that a test starts get these variables from this process.
os.environ["UPSTREAM_OUTCOMES"] = os.devnull
MANY: Final = 1000
#: Of an exception's text, and of the number of exceptions in a chain, what is kept.
KEPT_CHARACTERS: Final = 3000
KEPT_ERRORS: Final = 8

_found: dict[str, Any] = {}


class TestTookTooLongError(BaseException):
    """The test did not end in time; no handler of the tested program takes it."""

    __test__ = False


def pytest_configure() -> None:
    """Let no test wait for a hub that is out of reach; each request is tried six times."""
    import importlib

    try:
        requests: Any = importlib.import_module("huggingface_hub.utils._http")
    except ImportError:
        return
    requests.time = SimpleNamespace(**vars(time) | {"sleep": lambda _seconds: None})


def _write(line: dict[str, Any]) -> None:
    with FILE.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _ended(_signal: int, _frame: object) -> None:
    raise TestTookTooLongError(f"not done after {LIMIT_S:.0f} s")


def chain_of(error: BaseException | None) -> list[tuple[str, str]]:
    """Return an error and those it came from: the class's name and the text of each."""
    chain: list[tuple[str, str]] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen and len(chain) < KEPT_ERRORS:
        seen.add(id(error))
        try:
            text = str(error)
        except Exception as broken:  # noqa: BLE001  # a stranger's __str__
            text = f"<{type(broken).__name__}>"
        if len(text) > KEPT_CHARACTERS:
            # Where a child process failed, its last words are the reason.
            text = f"{text[:500]} ... {text[-KEPT_CHARACTERS + 505 :]}"
        chain.append((type(error).__qualname__, text))
        error = error.__cause__ or error.__context__
    return chain


def _allocations() -> int:
    """Return how often the cards have been asked for bytes in this process."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(
        torch.cuda.memory_stats(each).get("allocation.all.allocated", 0)
        for each in range(torch.cuda.device_count())
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return what a file has; nothing where there is none."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(each) for each in text.splitlines()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what a run before this one has begun, and what is not asked for."""
    done = {each["test"] for each in _lines(FILE)}
    if SKIPPED:
        ends = {each["test"]: each["outcome"] for each in _lines(Path(SKIPPED))}
        done |= {each.nodeid for each in items if ends.get(each.nodeid) != "skipped"}
    if HOST:
        # A run that is ended early has all tests that need a card, and some of the others.
        ends = {each["test"]: each["outcome"] for each in _lines(Path(HOST))}
        items.sort(key=lambda each: ends.get(each.nodeid) != "skipped")
    sizes: dict[str, int] = {}
    kept = []
    for each in items:
        file = each.nodeid.partition("::")[0]
        number = sizes[file] = sizes.get(file, 0) + 1
        kept.append((file, number, each))
    items[:] = [
        each
        for file, number, each in kept
        if (sizes[file] < MANY or number % EVERY == 0) and each.nodeid not in done
    ]
    if LIST:
        _list(items)
        items.clear()


def _list(items: list[pytest.Item]) -> None:
    """Write down which tests are skipped by a mark, and list the others."""
    from _pytest.skipping import evaluate_skip_marks  # no public name

    with Path(LIST).open("w", encoding="utf-8") as file:
        for each in items:
            skipped = evaluate_skip_marks(each)
            if skipped is None:
                name = each.nodeid.partition("::")[2]
                file.write(f"{each.path}::{name}\n")
            else:
                chain = [("Skipped", skipped.reason)]
                _write({"test": each.nodeid, "outcome": "skipped", "chain": chain})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Write down a file that cannot be read."""
    if report.failed:
        text = str(report.longrepr)[-KEPT_CHARACTERS:]
        _write({"test": report.nodeid, "outcome": "failed", "chain": [["", text]]})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Write a line before a test and one after it; end it when its time is over."""
    _found.clear()
    _found.update(test=item.nodeid, outcome="passed", chain=[], where="")
    _write({"test": item.nodeid, "outcome": "begun"})
    began_s, before = time.monotonic(), _allocations()
    signal.signal(signal.SIGALRM, _ended)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _found["seconds"] = round(time.monotonic() - began_s, 2)
        _found["allocations"] = _allocations() - before
        _write(_found)
        if time.time() > UNTIL_S:
            item.session.shouldstop = "its time is over"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,  # noqa: ARG001
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the outcome, and the errors behind it."""
    report = yield
    if report.failed or (report.skipped and _found["outcome"] == "passed"):
        expected = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        _found["outcome"] = expected
        if call.excinfo is not None:
            _found["chain"] = chain_of(call.excinfo.value)
            last = call.excinfo.traceback[-1]
            _found["where"] = f"{last.path}:{last.lineno + 1}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what a subtest failed of: the test around it only counts them."""
    if type(report).__name__ == "SubtestReport" and report.failed:
        _found["subtests"] = str(report.longrepr)[-KEPT_CHARACTERS:]
