"""The battery on loaders: from Python, as a command, and as tests without a file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem import check_loader, simulated_device
from pytest_gpumem.checking.check_report import CheckRequest, as_test_file
from pytest_gpumem.checking.named_function import NamedFunction
from pytest_gpumem.cli import main
from pytest_gpumem.errors import CheckError, RuleError, SweepError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOADERS = """
import torch

KEPT = []
NAME = "not a function"


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6)))


def good():
    for dtype in (torch.float32, torch.float16):
        model = build()
        try:
            return model.to("cuda", dtype)
        except torch.OutOfMemoryError:
            del model
    return build()


def half_moved():
    model = build()
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        return model


def without_fallback():
    return build().to("cuda")


def leaky():
    model = build()
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        KEPT.append(model)
    return build()


def swallows():
    model = build()
    try:
        return model.to("cuda")
    except RuntimeError:
        return model.to("cpu")


def imprecise():
    model = build()
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        torch.nn.init.zeros_(model[0].weight)
        return model.to("cpu")


def smaller():
    try:
        return build().to("cuda")
    except torch.OutOfMemoryError:
        return build()[:2]


def on_the_host():
    return build()


def no_model():
    return torch.zeros(3, device="cuda")


def with_path(path, *, dtype=None):
    return build()


def broken():
    raise ValueError("no such checkpoint")


async def later():
    return build()


def infer(model):
    return model[0].weight[:4].float().cpu()
"""
MODULE = "loaders_under_check"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project's folder with loaders, which is the working folder."""
    (tmp_path / f"{MODULE}.py").write_text(LOADERS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def loader(name: str) -> Any:
    """Return one of the loaders."""
    functions: dict[str, Any] = {}
    exec(LOADERS, functions)  # noqa: S102  # written above
    return functions[name]


def held(name: str, **options: Any) -> dict[str, bool]:
    """Return which questions are answered with yes; budgets at which one rung fits."""
    options.setdefault("budgets", ["12MiB", "4MiB"])
    with simulated_device("T4"):
        check = check_loader(loader(name), **options)
    assert check.is_good == all(each.holds for each in check.findings)
    return {each.question: each.holds for each in check.findings if each.num_tried}


LOADS = "loads on the whole card"
BUDGETS = "loads under each budget"
ONCE = "recovers where one allocation fails"
FULL = "recovers, or ends in a clean OOM, where the card stays full"
CONTROL = "lets an error through that is not an OOM"
LEFT = "leaves nothing on the card"
HALF = "never leaves a model half moved"
SAME = "computes the same as the CPU"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("good", set()),
        ("half_moved", {BUDGETS, ONCE, FULL, HALF}),
        ("without_fallback", {BUDGETS, ONCE}),
        ("leaky", {BUDGETS, ONCE, FULL, LEFT}),
        ("swallows", {CONTROL}),
        ("imprecise", {BUDGETS, ONCE, FULL, SAME}),
        ("smaller", set()),
    ],
)
def test_each_fault_is_named(name: str, wrong: set[str]) -> None:
    """A loader that is wrong in one way fails the questions about that, and no others."""
    answers = held(name, run=loader("infer"))

    assert {LOADS, BUDGETS, ONCE, FULL, CONTROL, LEFT, HALF, SAME} == answers.keys()
    assert wrong == {question for question, holds in answers.items() if not holds}


def test_a_smaller_model_is_named_as_such() -> None:
    """A rung with another model is told by its parameters, and written into the tests."""
    with simulated_device("T4"):
        check = check_loader(loader("smaller"), budgets=["4MiB"])

    step = check.staircase.steps[1]
    assert "cpu float32, 0.5 M parameters" == step.rung
    assert check.has_variants
    name = NamedFunction(MODULE, "smaller")
    assert "variants=True" in as_test_file(name, None, check)


def test_without_run_nothing_is_said_of_outputs() -> None:
    """What was not asked is not answered."""
    with simulated_device("T4"):
        check = check_loader(loader("good"), budgets=["4MiB"], points=1)

    last = check.findings[-1]
    assert 0 == last.num_tried
    assert "not tried: name a function that computes, with --run" == last.words


@pytest.mark.parametrize(
    ("name", "options", "kind", "text"),
    [
        ("on_the_host", {}, CheckError, "build puts nothing on the card"),
        ("no_model", {}, CheckError, "no torch.nn.Module"),
        ("broken", {}, CheckError, "fails without any fault"),
        ("good", {"points": "few"}, SweepError, "'few'"),
        ("good", {"only": "nowhere:nth=1"}, RuleError, "nowhere"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    name: str, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """The error says what is wrong with the loader, or with what was asked."""
    with simulated_device("T4"), pytest.raises(kind, match=text):
        check_loader(loader(name), name="build", **options)


def test_the_command_ends_with_verdicts_and_replays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong loader exits with 1; its replay shows the same fault alone."""
    target = f"{MODULE}:half_moved"
    arguments = ["check", target, "--run", f"{MODULE}:infer", "--budgets", "4MiB"]

    assert 1 == main(arguments)

    out, err = capsys.readouterr()
    replay = f"pytest-gpumem {' '.join(arguments[:4])} --replay any:nth=12"
    assert f"replay: {replay}\n" in out
    assert "\nFAILED   " in out
    assert f"as a test: pytest-gpumem {' '.join(arguments[:4])} --write tests/" in out
    assert "  4 MiB: cpu+cuda:0 float32\n" in err
    assert 1 == main([*arguments[:4], "--replay", "any:nth=12"])
    assert "any:nth=12: it ended in cpu+cuda:0 float32" in capsys.readouterr().out
    assert main([*arguments[:4], "--replay", "512MiB"]) == 0
    assert str(folder) not in sys.path


def test_the_written_file_is_a_test_of_the_same(
    pytester: pytest.Pytester, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It passes where the check did, expects the rungs, and is never written over."""
    file = folder / "test_written.py"
    arguments = ["check", f"{MODULE}:good", "--budgets", "12MiB,2MB"]
    arguments += ["--run", f"{MODULE}:infer", "--write", str(file)]

    assert 0 == main(arguments)

    assert f"python -m pytest --gpu-backend=auto {file}" in capsys.readouterr().out
    assert '"2000000 B": "cpu float32"' in file.read_text()
    assert 1 == main(arguments)
    assert "exists and is not overwritten" in capsys.readouterr().err
    pytester.syspathinsert(folder)
    pytester.runpytest("--gpu-card=T4", file).assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["loaders"], "'loaders' names no function; write MODULE:FUNCTION"),
        (["nowhere_at_all:load"], "there is no module 'nowhere_at_all', neither in"),
        ([f"{MODULE}:nix"], "has no 'nix'; its functions are build, good, half_moved"),
        ([f"{MODULE}:NAME"], "is of type str, which cannot be called; name a function"),
        ([f"{MODULE}:with_path"], "takes (path, *, dtype=None), and is called with no"),
        (
            [f"{MODULE}:later"],
            "does nothing when it is called, as it is a generator or",
        ),
        (
            [f"{MODULE}:broken"],
            f"at {MODULE}.py:81 in broken: ValueError: no such check",
        ),
        ([f"{MODULE}:good", "--run", f"{MODULE}:build"], "what the loader returns"),
        ([f"{MODULE}:good", "--card", "nix"], "'nix' is not a known card"),
        ([f"{MODULE}:good", "--budgets", "4x"], "unknown unit 'x'"),
        ([f"{MODULE}:good", "--points", "few"], "points='few'"),
        ([f"{MODULE}:good", "--write", "a.txt"], "a.txt does not end in .py"),
        ([f"{MODULE}:good", "--write", "no/test_a.py"], "no is not a folder"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_mistake_is_told_in_one_sentence(
    given: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is tried, and the exit code is 1."""
    assert 1 == main(["check", *given])

    out, err = capsys.readouterr()
    assert not out
    assert text in err.splitlines()[-1]


def test_a_module_that_fails_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error at import is the module's, not a missing module."""
    (folder / "fails_at_import.py").write_text("import no_such_library\n")

    assert 1 == main(["check", "fails_at_import:load"])

    text = "fails_at_import cannot be imported: ModuleNotFoundError: No module named"
    assert text in capsys.readouterr().err


def test_pytest_checks_a_loader_without_a_test_file(
    pytester: pytest.Pytester,
) -> None:
    """The tests are those that would be written; each replays by the option."""
    pytester.makepyfile(**{MODULE: LOADERS, "test_mine": "def test_mine(): pass"})
    option = f"--gpu-check={MODULE}:half_moved,run={MODULE}:infer"

    result = pytester.runpytest(option)

    name = f"{MODULE}:half_moved,run={MODULE}:infer"
    result.stdout.fnmatch_lines(
        [
            f"*replay: pytest {option} --gpu-replay-oom=any:nth=12",
            f"*{name}::test_it_ends_where_it_should*",
        ]
    )
    result.stdout.no_fnmatch_line("*test_mine*")
    replay = pytester.runpytest(option, "--gpu-replay-oom=any:nth=12")
    # Without subtests, before pytest 9, it is indented.
    replay.stdout.fnmatch_lines(["*allocation 12, transient, native: wrong result"])
    replay.stdout.no_fnmatch_line("*test_it_ends_where_it_should*")
    sys.modules.pop(MODULE, None)


def test_named_tests_run_beside_a_check(pytester: pytest.Pytester) -> None:
    """Who names tests wants them too."""
    pytester.makepyfile(**{MODULE: LOADERS, "test_mine": "def test_mine(): pass"})

    option = f"--gpu-check={MODULE}:good"
    result = pytester.runpytest(option, "--collect-only", "-q", "test_mine.py")

    result.stdout.fnmatch_lines(
        ["test_mine.py::test_mine", f"{MODULE}:good::test_it_ends_where_it_should"]
    )
    sys.modules.pop(MODULE, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("nowhere_at_all:load", "--gpu-check: there is no module 'nowhere_at_all'"),
        ("nowhere", "'nowhere' names no function"),
        ("a:b,c=d:e", "'c=d:e' is not accepted; write MODULE:LOAD, or"),
    ],
)
def test_a_wrong_option_ends_the_run(
    pytester: pytest.Pytester, value: str, text: str
) -> None:
    """Before any test."""
    result = pytester.runpytest(f"--gpu-check={value}")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"*{text}*"])


def test_a_request_reads_as_it_is_written() -> None:
    """Both ways back to text are what was typed."""
    text = "models:Net.load,run=models:infer"
    request = CheckRequest.parse(text)

    assert text == str(request)
    assert "pytest-gpumem check models:Net.load --run models:infer" == request.command()


def test_ends_are_the_first_and_last_of_each_site() -> None:
    """A plan by ends fails a site's last allocation too."""
    from pytest_gpumem.sweeps.plan import SweepPlan

    plan = SweepPlan(points="ends", modes=["transient"])
    sites = ("a", "b", "b", "a", "c", "b")

    assert [1, 2, 4, 5, 6] == [each.number for each in plan.points_of(sites)]


def test_a_sweep_looks_at_what_was_loaded_without_faults() -> None:
    """``run`` is not swept: its allocations neither count nor fail."""
    from pytest_gpumem import sweep_ooms

    with simulated_device("T4"):
        report = sweep_ooms(
            lambda: torch.nn.Linear(64, 64).to("cuda"),
            run=lambda model: model(torch.ones(2, 64, device="cuda")).cpu(),
        )

    assert len(report.sites) == 2  # weight and bias
    assert {each.detail.split(":")[0] for each in report.outcomes} == {
        "OutOfMemoryError"
    }
