"""Change the code a little, and see whether its tests notice: tox run -e mutation.

Needs cosmic-ray, which says what can be changed, and a system that can fork. pytest collects
the tests of all modules in question once, and runs them once to see which lines each of
them reaches. Each mutant then has a process forked from there: the changed module is
executed anew, what others have imported of it is replaced, and the tests that reach the
changed statement run, the quickest first, until one fails. Survivors are printed on the
standard error.

Limits: an object of the old module that is held by anything but a module's name goes on
as it was, and so does a child process. A survivor is told for certain by changing the
file and running the tests.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import gc
import json
import os
import random
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

ROOT = Path(__file__).parents[1]
#: Modules, and the tests that hold them: files and folders of ``tests``.
TESTS = {
    "sizes cards files": "ground",
    "inheritance": "ground/test_inheritance.py fuzz/test_fuzz_texts.py",
    "rules/*": "rules",
    "allocator/*": "allocator tenancy/test_tenants.py",
    "records/*": "records sweeps/test_sweep_model.py fuzz/test_fuzz_files.py",
    "baselines/*": "baselines/test_baselines.py",
    "tenancy/queue": "tenancy/test_tenancy.py",
    "devices/budgets": "devices/test_budgets.py",
    "guards stacks instruments/*": "instruments sweeps rules devices/test_budgets.py",
    "sweeps/*": "sweeps fuzz/test_fuzz_state.py",
}
PACKAGE = ROOT / "pytest_gpumem"
MODULES = {
    str(file.relative_to(PACKAGE).with_suffix("")): tests
    for names, tests in TESTS.items()
    for name in names.split()
    for file in sorted(PACKAGE.glob(f"{name}.py"))
    if file.name != "__init__.py"
}
#: The operator in ``int | None``, which is never run.
_UNSEEN = "core/ReplaceBinaryOperator_BitOr"
#: Seconds that a mutant's process may take beside the time of its tests, and how often
#: that time: one that hangs is noticed.
_PATIENCE_S = 30.0
_PATIENCE = 10.0


def forked(work: Callable[[], int], limit_s: float, log: Path) -> int:
    """Return what a function does in a process of its own; 1 if that dies or hangs."""
    process = os.fork()
    if not process:
        code = 1
        try:
            os.setsid()
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            code = work()
        except BaseException:  # noqa: BLE001  # nothing may go on in this process
            traceback.print_exc()
        finally:
            os._exit(code)
    handle = os.pidfd_open(process)
    if not select.select([handle], [], [], limit_s)[0]:
        os.kill(process, signal.SIGKILL)
    os.close(handle)
    status = os.waitpid(process, 0)[1]
    with contextlib.suppress(ProcessLookupError):  # what it has started
        os.killpg(process, signal.SIGKILL)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1


def run_items(items: list[pytest.Item], failed: Path | None = None) -> int:
    """Run tests; at the first that fails stop, write its name down and return 1."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        if item.session.testsfailed and failed is not None:
            failed.write_text(item.nodeid, encoding="utf-8")
            return 1
    return 0


class Survey:
    """Notes which lines of some files each test reaches, and what it costs."""

    def __init__(self, files: set[str]) -> None:
        self._files = files
        self._lines: set[tuple[str, int]] = set()

    def _enter(self, frame: FrameType, _event: str, _arg: object) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, _event: str, _arg: object) -> Any:
        self._lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def run(self, items: list[pytest.Item], into: Path) -> int:
        """Run tests and write down what is found: seconds and lines, by test."""
        found = {}
        for item, following in zip(items, [*items[1:], None], strict=True):
            self._lines.clear()
            threading.settrace(self._enter)
            sys.settrace(self._enter)
            start_s = time.process_time()
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds = time.process_time() - start_s
            found[item.nodeid] = (seconds, list(self._lines))
        into.write_text(json.dumps(found), encoding="utf-8")
        return 0


def statement(tree: ast.Module, line: int) -> set[int] | None:
    """Return the lines of the innermost statement at a line, without its body.

    None outside functions: such a statement runs as the module is imported.
    """
    found: set[int] = set()
    is_inside = False
    for node in ast.walk(tree):  # from the outside in
        if not isinstance(node, ast.stmt | ast.excepthandler | ast.match_case):
            continue
        body = getattr(node, "body", None)
        first = getattr(node, "lineno", line)
        whole = getattr(node, "end_lineno", first)
        if first <= line <= whole:
            if isinstance(node, ast.FunctionDef) and body and line >= body[0].lineno:
                is_inside = True
            last = max(body[0].lineno - 1, first) if body else whole
            if line <= last:
                found = {*range(first, last + 1)}
    return (found or {line}) if is_inside else None


def mutants(source: str, draw: random.Random) -> list[tuple[int, str]]:
    """Return changed sources, each with its line: one of each kind at each place.

    Where several operators put something else in the same place (another comparison,
    another number), one of them is drawn.
    """
    tree, lines = get_ast(source), source.splitlines()
    found: dict[tuple[str, tuple[int, int]], tuple[int, str]] = {}
    names = list(operator_names())
    draw.shuffle(names)
    for name in names:
        operator_class = get_operator(name)
        if operator_class.arguments() or name.startswith(_UNSEEN):
            continue
        operator = operator_class()
        starts = [
            start
            for node in ast_nodes(tree)
            for start, _end in operator.mutation_positions(node)
        ]
        for occurrence, start in enumerate(starts):
            place = (name.partition("_")[0], start)
            # Only types are imported in such a block.
            if place not in found and lines[start[0] - 1] != "if TYPE_CHECKING:":
                changed = mutate_code(source, operator, occurrence)
                found[place] = (start[0], changed)
    return sorted(found.values())


def replace_module(name: str, source: str) -> None:
    """Execute a module's changed source; replace its objects where they were imported."""
    module = sys.modules[name]
    names = vars(module)
    old = {key: each for key, each in names.items() if not key.startswith("__")}
    exec(compile(source, str(module.__file__), "exec"), names)  # noqa: S102
    for other in list(sys.modules.values()):
        held = getattr(other, "__dict__", None)
        if held is None or held is names:
            continue
        for key in old.keys() & held.keys():
            if held[key] is old[key]:
                held[key] = names.get(key)
    for key, each in old.items():
        new = names.get(key)
        if not isinstance(each, type) or not isinstance(new, type) or new is each:
            continue
        heirs: list[type] = type.__subclasses__(each)
        for heir in heirs:
            heir.__bases__ = tuple(
                new if base is each else base for base in heir.__bases__
            )


class Mutation:
    """A plugin of pytest that runs the tests on mutants instead of on the code.

    Args:
        options: The options of the command line.
        folder: The folder of the files that processes exchange.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._log = folder / "log"
        self._answer = folder / "answer"
        self._items: dict[str, pytest.Item] = {}
        self._reach: dict[str, tuple[float, list[list[Any]]]] = {}
        #: How many of a module's mutants a test has noticed.
        self._killers: Counter[str] = Counter()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run all mutants of all modules."""
        self._items = {each.nodeid: each for each in session.items}
        files = {name: PACKAGE / f"{name}.py" for name in self._options.modules}
        gc.collect()
        gc.freeze()  # no process forked from here goes through all that was imported
        survey = Survey({str(each) for each in files.values()})
        items = list(session.items)
        forked(lambda: survey.run(items, self._answer), 3600, self._log)
        self._reach = json.loads(self._answer.read_text(encoding="utf-8"))
        print("\n| module | mutants | killed |\n|---|---|---|", flush=True)
        for name, file in files.items():
            count, killed = self._module(name, file)
            print(f"| `{name}` | {count} | {killed} |", flush=True)
        return True

    def _module(self, name: str, file: Path) -> tuple[int, int]:
        dotted = f"pytest_gpumem.{name.replace('/', '.')}"
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
        reached: dict[str, set[int]] = {}
        for test, (seconds, places) in self._reach.items():
            own = {line for path, line in places if path == str(file)}
            if own and seconds < self._options.slow:
                reached[test] = own
        draw = random.Random(self._options.seed)  # noqa: S311  # a repeatable sample
        wanted = mutants(source, draw)
        if self._options.most is not None:
            wanted = draw.sample(wanted, min(self._options.most, len(wanted)))
        self._killers.clear()
        killed = 0
        for line, changed in wanted:
            lines = statement(tree, line)
            while True:
                tests = [
                    each for each in reached if lines is None or lines & reached[each]
                ]
                culprit = self._first_failure(dotted, changed, tests)
                if culprit is None or culprit in self._killers:
                    break
                # Does the test notice the change, or only that the module was executed
                # again?
                if (
                    culprit
                    and self._first_failure(dotted, source, [culprit]) is not None
                ):
                    del reached[culprit]
                    print(f"{name}: {culprit} is left out", file=sys.stderr)
                else:
                    self._killers[culprit] = 0
            if culprit is not None:
                self._killers[culprit] += 1
                killed += 1
                continue
            print(f"--- {name}:{line}: {len(tests) or 'no'} tests", file=sys.stderr)
            pair = source.splitlines(), changed.splitlines()
            diff = list(difflib.unified_diff(*pair, n=1, lineterm=""))
            print("\n".join(diff[2:]), file=sys.stderr, flush=True)
        return len(wanted), killed

    def _first_failure(self, module: str, source: str, tests: list[str]) -> str | None:
        """Return the test that notices a change; empty if the process died or hung."""
        tests = sorted(tests, key=lambda each: self._reach[each][0])
        tests.sort(key=lambda each: -self._killers[each])
        total_s = 0.0
        items: list[pytest.Item] = []
        for each in tests:
            total_s += self._reach[each][0]
            if items and total_s > self._options.seconds:
                break
            items.append(self._items[each])

        def work() -> int:
            replace_module(module, source)
            return run_items(items, self._answer)

        self._answer.write_text("", encoding="utf-8")
        limit_s = _PATIENCE_S + _PATIENCE * min(total_s, self._options.seconds)
        if not forked(work, limit_s, self._log):
            return None
        return self._answer.read_text(encoding="utf-8")


def main() -> None:
    """Print a row for each module, and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=list(MODULES))
    parser.add_argument(
        "--most", type=int, help="mutants of each module; all by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--slow", type=float, default=5.0, help="leave out such tests (s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of tests, each mutant"
    )
    options, of_pytest = parser.parse_known_args()
    places = dict.fromkeys(" ".join(MODULES[each] for each in options.modules).split())
    tests = [str(ROOT / "tests" / each) for each in places]
    os.chdir(ROOT)
    quiet = ["-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-s"]
    with tempfile.TemporaryDirectory() as folder:
        plugin = Mutation(options, Path(folder))
        raise SystemExit(pytest.main([*quiet, *of_pytest, *tests], plugins=[plugin]))


if __name__ == "__main__":
    main()
