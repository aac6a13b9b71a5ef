"""Child processes take over device, budgets and rules; their peaks come back."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import pytest_gpumem
from pytest_gpumem import simulated_device
from pytest_gpumem.children import child
from pytest_gpumem.children.notes import MAX_RULES, Note, read_notes, together
from pytest_gpumem.children.watch import Watch
from pytest_gpumem.devices.simulated.device import SimulatedDevice
from pytest_gpumem.inheritance import (
    CHILDREN_VARIABLE,
    REFUSAL_VARIABLE,
    Inheritance,
    pass_budget_on,
)
from pytest_gpumem.records.memory_figures import MemoryFigures

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["pytester"]

MIB = 2**20
ROOT = Path(pytest_gpumem.__file__).parent
GIVEN = Inheritance("simulated", "/nowhere", {"card": "T4*2"}, {"": "1GiB"})


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be a process that no run has reached, and stay one."""
    monkeypatch.delenv(CHILDREN_VARIABLE, raising=False)
    yield
    child.withdraw()


# -- what is handed down ------------------------------------------------------------------


def test_budgets_are_handed_down_only_below_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block's budget reaches children; without a run nothing is set."""
    monkeypatch.delenv(CHILDREN_VARIABLE, raising=False)
    pass_budget_on(0, 7)
    alone = os.environ.get(CHILDREN_VARIABLE)
    monkeypatch.setenv(CHILDREN_VARIABLE, GIVEN.text)
    pass_budget_on(1, 7)
    inside = Inheritance.parse(os.environ[CHILDREN_VARIABLE]).budgets
    pass_budget_on(1, None)
    after = Inheritance.parse(os.environ[CHILDREN_VARIABLE])
    monkeypatch.setenv(CHILDREN_VARIABLE, "somebody else's")
    pass_budget_on(1, 7)

    assert alone is None
    assert {"": "1GiB", "1": "7"} == inside
    assert GIVEN == after
    assert "somebody else's" == os.environ[CHILDREN_VARIABLE]


# -- in a child ---------------------------------------------------------------------------


@pytest.mark.usefixtures("_alone")
def test_a_process_takes_over_and_lets_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Device, budgets and rules are in force; a run of its own withdraws them."""
    folder = str(tmp_path / "notes")
    given = GIVEN._replace(
        folder=folder, budgets={"": "1GiB", "1": "50%"}, rules=("any:nth=2",)
    )
    monkeypatch.setenv(CHILDREN_VARIABLE, given.text)

    child.activate()
    child.activate()  # the second way in finds the first's work
    free = [torch.cuda.mem_get_info(index)[0] for index in range(2)]
    kept = torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda:1")
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1, device="cuda:1")
    again = torch.zeros(MIB, dtype=torch.uint8, device="cuda:1")
    del kept, again
    child._active[0]._watch.finish()
    (note,) = read_notes(Path(folder))
    child.withdraw()

    assert 2**30 == free[0]
    assert free[1] > 7 * 2**30
    assert (os.getpid(), 1) == (note.pid, note.failed_counts[0])
    assert note.environment.startswith("Tesla T4, simulated, torch ")
    assert [1] == list(note.figures)
    assert (4 * MIB, 1) == (
        note.figures[1].peak_allocated_bytes,
        note.figures[1].num_ooms,
    )


@pytest.mark.usefixtures("_alone")
def test_a_broken_variable_is_said_and_survived(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process starts all the same."""
    monkeypatch.setenv(CHILDREN_VARIABLE, "{}")
    monkeypatch.setattr(child, "_broken", set())

    child.activate()
    child.activate()  # once is enough to be told

    assert [] == child._active
    told = capsys.readouterr().err.splitlines()
    assert 1 == len(told)
    assert told[0].startswith(
        f"pytest-gpumem: {CHILDREN_VARIABLE} was not set by a run"
    )


# -- figures ------------------------------------------------------------------------------


def test_a_peak_is_in_the_file_at_once(tmp_path: Path) -> None:
    """Without any end of the process; nothing is written before a card is used."""
    with simulated_device("T4") as machine:
        watch = Watch(SimulatedDevice(machine), str(tmp_path / "notes"), [5])
        watch.start()
        before = read_notes(tmp_path / "notes")
        torch.zeros(3 * MIB, dtype=torch.uint8, device="cuda")
        (during,) = read_notes(tmp_path / "notes")
        watch.stop()

    assert [] == before
    assert 3 * MIB == during.figures[5].peak_allocated_bytes
    assert 5 == during.figures[5].device_index


def test_several_children_count_as_one(tmp_path: Path) -> None:
    """The largest peak on each card; errors are added up; nothing is left."""
    with simulated_device("T4*2") as machine:
        device = SimulatedDevice(machine)
        figures = []
        for index, mib in ((0, 1), (0, 4), (1, 2)):
            tracker = device.open_tracker(index)
            held = torch.zeros(mib * MIB, dtype=torch.uint8, device=f"cuda:{index}")
            figures.append(tracker.close())
            del held
            torch.cuda.empty_cache()
    for each in figures:
        note = Note(tmp_path, "T4")
        note.write_card(each.device_index, each)
        note.write(1, [])
    (tmp_path / "broken.gpumem").write_text("{}")
    one, two = together(read_notes(tmp_path))

    assert (4 * MIB, 2 * MIB) == (one.peak_allocated_bytes, two.peak_allocated_bytes)
    assert (0, 0) == (one.end_allocated_bytes, one.end_reserved_bytes)


def test_what_a_child_does_not_know_stays_unknown(tmp_path: Path) -> None:
    """In its file, and of all children together: one may have had more."""
    known = MemoryFigures(0, 1, 2, 1, 1, 0, 0, 0, 0, 0, 0, 7, 9)
    for figures in (known, replace(known, peak_process_bytes=None)):
        note = Note(tmp_path, "T4")
        note.write_card(0, figures)
        note.write(1, [])
    read = [each.figures[0] for each in read_notes(tmp_path)]
    (one,) = together(read_notes(tmp_path))

    assert {None, 7} == {each.peak_process_bytes for each in read}
    assert (None, 9) == (one.peak_process_bytes, one.peak_card_bytes)


# -- how a child is reached ---------------------------------------------------------------

ASK = "import torch; print(torch.cuda.get_device_name(0))"


def test_the_installed_file_and_the_folder_on_the_path_both_work(
    tmp_path: Path,
) -> None:
    """Either reaches a process; without the variable there is nothing.

    The environment's own sitecustomize has its turn.
    """
    beside = ROOT.parent / "pytest_gpumem_child.pth"  # where a wheel has put it
    source = ROOT / "children" / beside.name
    line = (source if source.exists() else beside).read_text("utf-8")
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("print('own')\n")
    paths = [str(ROOT / "children" / "shim"), str(own)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    reached = {
        **environment,
        CHILDREN_VARIABLE: GIVEN._replace(options={"card": "K80"}).text,
    }
    add = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r})\n{line}"
    look = "; import sys, os; print('pytest_gpumem' in sys.modules)"

    def python(code: str, environment: dict[str, str]) -> list[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split("\n")[:-1]

    isolated = {**reached, "PYTHONPATH": ""}
    assert ["own", "Tesla K80"] == python(ASK, reached)
    assert ["own", "False"] == python(look[2:], {**environment, CHILDREN_VARIABLE: ""})
    assert ["True"] == python(f"{add}{look[2:]}", isolated)
    assert ["False"] == python(f"{add}{look[2:]}", {**isolated, CHILDREN_VARIABLE: ""})
    refused = {REFUSAL_VARIABLE: "1"}
    assert ["False"] == python(f"{add}{look[2:]}", {**isolated, **refused})
    assert ["own", "False"] == python(look[2:], {**reached, **refused})
    assert 1 == len(line.splitlines())


def test_the_wheel_carries_the_file() -> None:
    """Beside the package, where Python looks for it."""
    project = Path(__file__).parents[2] / "pyproject.toml"

    assert (
        '"pytest_gpumem/children/pytest_gpumem_child.pth" = "pytest_gpumem_child.pth"'
        in project.read_text("utf-8")
    )


# -- a run --------------------------------------------------------------------------------

TESTS = """
    import multiprocessing
    import os
    import subprocess
    import sys

    import pytest
    import torch

    from pytest_gpumem.inheritance import CHILDREN_VARIABLE, Inheritance

    CODE = (
        "import torch; x = torch.zeros(16 * 2**20, device='cuda', dtype=torch.uint8); "
        "print(torch.cuda.mem_get_info()[0] // 2**20, flush=True); "
        "torch.zeros(1, device='cuda')"
    )

    def given():
        return Inheritance.parse(os.environ[CHILDREN_VARIABLE])

    @pytest.mark.max_vram("16MiB", phase="children")
    @pytest.mark.inject_oom("any:nth=2")
    def test_budget_and_rule():
        assert {"": "128MiB"} == given().budgets
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True
        )
        assert 112 == int(done.stdout), done.stderr
        assert "OutOfMemoryError: CUDA out" in done.stderr

    def test_block(vram_budget):
        with vram_budget("64MiB"):
            assert {"": "128MiB", "0": str(64 * 2**20)} == given().budgets
        assert {"": "128MiB", "0": str(128 * 2**20)} == given().budgets

    def has_no_room(mib):
        context = multiprocessing.get_context("fork")
        process = context.Process(target=ends_without_room, args=(mib,))
        process.start()
        process.join()
        return {0: False, 3: True}[process.exitcode]

    def ends_without_room(mib):
        try:
            work(mib, False)
        except torch.OutOfMemoryError:
            os._exit(3)

    @pytest.mark.max_vram("15MiB", phase="children")
    @pytest.mark.gpu_budget("32MiB")
    def test_over():
        assert {"": "128MiB", "0": "32MiB"} == given().budgets
        assert not has_no_room(16)
        assert has_no_room(33)

    @pytest.mark.inject_oom("any:nth=1")
    def test_only_a_fault():
        assert has_no_room(1)

    def work(mib, ends):
        # Not zeros: after a fork, OpenMP has no threads to fill them with.
        torch.empty(mib * 2**20, dtype=torch.uint8, device="cuda")
        if ends:
            os._exit(0)

    @pytest.mark.parametrize(
        ("how", "sizes"), [("fork", [3, 7]), ("spawn", [7])], ids=["fork", "spawn"]
    )
    def test_multiprocessing(how, sizes):
        context = multiprocessing.get_context(how)
        processes = [
            context.Process(target=work, args=(mib, mib > 5)) for mib in sizes
        ]
        for each in processes:
            each.start()
        for each in processes:
            each.join()
        assert {0} == {each.exitcode for each in processes}

    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            held = torch.empty(2**20, dtype=torch.uint8, device="cuda")
            return torch.cuda.mem_get_info()[0] // 2**20

    def test_loader():
        loader = torch.utils.data.DataLoader(
            Numbers(), num_workers=2, multiprocessing_context="fork"
        )
        assert [126] * 4 == [int(each) for each in loader]

    def test_no_child():
        pass
"""


def test_tests_children_are_in_a_run(pytester: pytest.Pytester) -> None:
    """Subprocesses, multiprocessing, workers of a DataLoader: budgets, rules, limits.

    Peaks come back to the test that started them, and the environment is as it was.
    """
    pytester.makepyfile(test_it=TESTS)
    before = dict(os.environ)

    result = pytester.runpytest_inprocess(
        "--gpu-budget=128MiB", "-p", "no:cacheprovider", "-v", "--junitxml=j.xml"
    )

    result.assert_outcomes(passed=7, failed=1)
    result.stdout.fnmatch_lines(
        [
            "peak VRAM above max_vram: allocated 16 MiB *limit 15 MiB*, 1 MiB too much",
            "in the test's children",
        ]
    )
    result.stdout.fnmatch_lines_random(
        [
            "* 16 MiB * 1 * test_it.py::test_budget_and_rule (children)",
            "* 7 MiB * test_it.py::test_multiprocessing[[]fork] (children)",
            "* 7 MiB * test_it.py::test_multiprocessing[[]spawn] (children)",
            "* 1 MiB * test_it.py::test_loader (children)",
        ]
    )
    result.stdout.no_fnmatch_line("*test_no_child (*")
    report = (pytester.path / "j.xml").read_text("utf-8")
    assert 3 == report.count('name="gpumem.children" value="2"')
    after = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    before.pop("PYTEST_CURRENT_TEST")
    assert before == after


def test_children_can_be_left_alone(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an option or a variable; and a run whose backend is off says nothing to its children."""
    pytester.makepyfile(
        test_it=f"""
        import os

        def test_it():
            assert {CHILDREN_VARIABLE!r} not in os.environ
        """
    )

    for option in ("--gpu-no-children", "--gpu-backend=off"):
        pytester.runpytest_inprocess(option).assert_outcomes(passed=1)
    monkeypatch.setenv(REFUSAL_VARIABLE, "1")
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_more_rules_than_a_note_counts_are_no_trouble(
    pytester: pytest.Pytester,
) -> None:
    """Failures by the first rules are counted; a child applies all rules."""
    code = "import torch; torch.zeros(1, device='cuda')"
    pytester.makepyfile(
        test_it=f"""
        import subprocess
        import sys

        def test_it():
            done = subprocess.run([sys.executable, "-c", {code!r}], stderr=subprocess.PIPE)
            assert b"OutOfMemoryError" in done.stderr
        """
    )
    rules = ["any:nth=1000"] * MAX_RULES

    done = pytester.runpytest(
        "-p",
        "no:cacheprovider",
        *(f"--gpu-inject-oom={rule}" for rule in [*rules, "any:nth=1"]),
    )

    done.assert_outcomes(passed=1)


#: What a program asks that knows nothing of torch; the last line is what it found.
_ASK = """
import pynvml

pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(0)
(process,) = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
print(pynvml.__file__, process.pid, process.usedGpuMemory == used > 0)
"""


def test_a_child_without_torch_asks_nvml(pytester: pytest.Pytester) -> None:
    """As ``gpustat``: it sees the run's bytes, and no driver, also with an older pynvml.

    Before its version 12, pynvml was a package that took all names from a module.
    """
    pynvml = pytest.importorskip("pynvml")
    package = pytester.mkdir("older") / "pynvml"
    package.mkdir()
    (package / "__init__.py").write_text("from .nvml import *\n")
    (package / "nvml.py").write_text(Path(pynvml.__file__).read_text())
    pytester.makepyfile(
        ask=_ASK,
        test_it="""
        import os, pathlib, subprocess, sys
        import torch

        def ask(**variables):
            found = subprocess.run(
                [sys.executable, "ask.py"], capture_output=True, text=True,
                check=False, env={**os.environ, **variables},
            )
            assert found.returncode == 0, found.stderr
            return found.stdout.split()

        def test_ask():
            kept = torch.zeros(2**20, device="cuda")
            older = pathlib.Path("older").resolve()
            place, *found = ask(PYTHONPATH=str(older))
            assert older in pathlib.Path(place).parents
            assert found == ask()[1:] == [str(os.getpid()), "True"]
        """,
    )

    result = pytester.runpytest("--gpu-backend=simulated", "--gpu-card=T4")

    result.assert_outcomes(passed=1)
