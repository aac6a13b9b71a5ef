"""The gate's verdict on changed trees is the one that a reviewer would give."""

from __future__ import annotations

import json
import random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from pytest_gpumem.baselines.baseline import Baseline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

pytest_plugins = ["pytester"]

MINOR = ".".join(torch.__version__.split("+")[0].split(".")[:2])
MIB = 2**20
OPTIONS = (
    *("-p", "no:cacheprovider", "-p", "no:randomly"),
    *("--gpu-backend=simulated", "--gpu-values=none"),
)
FILES = {
    "conftest": """
        import pytest
        import torch

        def take(mib):
            return torch.zeros(mib * 2**18, device="cuda")

        @pytest.fixture(name="take")
        def taker():
            return take

        @pytest.fixture(scope="session")
        def weights():
            return take(16)

        @pytest.fixture(scope="module")
        def model(weights):
            matrix = torch.ones(64, 64, device="cuda")
            matrix @ matrix
            return take(32)

        @pytest.fixture
        def batch():
            return take(2)
    """,
    "test_a": """
        import functools
        import torch

        LEFT = []

        @functools.cache
        def cached(take):
            return take(20)

        def test_one(model, take):
            take(4)

        def test_two(model, batch, take):
            kept = take(6)

        def test_three(model, batch, take):
            take(3)

        def test_first(take):
            cached(take)
            take(1)

        def test_second(take):
            cached(take)
            take(7)

        def test_leaks(take):
            LEFT.append(take(5))

        def test_late(request, take):
            one = take(1)
            request.getfixturevalue("model")
            other = take(1)

        def test_multiplies(model):
            matrix = torch.ones(64, 64, device="cuda")
            matrix @ matrix
    """,
    "test_b": """
        import torch

        def test_free(take):
            take(9)

        def test_five(model, take):
            take(5)
    """,
}
TESTS = 10


class Tree(NamedTuple):
    """A change of the project, and what a reviewer says of it.

    Attributes:
        edits: What is replaced, by what.
        lines: Lines of the output.
        failed: Tests and fixtures that fail.
        errors: Tests that fail after their call.
        options: Options of the run.
        is_inert: Whether a strict run fails beside its tests.
        torch_moved: By how many bytes the file's figures are lower, which are those of
            an earlier version of torch.

    """

    edits: Mapping[str, str] = MappingProxyType({})
    lines: tuple[str, ...] = ()
    failed: int = 0
    errors: int = 0
    options: tuple[str, ...] = ()
    is_inert: bool = False
    torch_moved: int | None = None


TREES = {
    "the same": Tree(lines=("b.json: 10 the same",)),
    "an honest regression": Tree(
        {"take(4)": "take(8)"},
        (
            "VRAM growth above the baseline b.json: allocated 4 MiB -> 8 MiB (*",
            "what was on the card before and is not this test's (48 MiB) does not *",
            "*--gpu-update-baseline and commit the file",
            "b.json: 9 the same, 1 changed",
            "*test_a.py::test_one*",
        ),
        failed=1,
    ),
    "a leak": Tree(
        {"kept = take(6)": "LEFT.append(take(6))"},
        (
            "VRAM left above the baseline b.json: allocated left 0 B -> 6 MiB (*",
            "b.json: 9 the same, 1 changed",
            "*test_a.py::test_two*",
        ),
        errors=1,
    ),
    "a leak that grows, of a test with fixtures": Tree(
        {"take(3)": "LEFT.append(take(30))"},
        ("*allocated 5 MiB -> 32 MiB*", "32 MiB of it stay after the call: *"),
        failed=1,
    ),
    "a fixture that grew": Tree(
        {"take(32)": "take(64)"},
        (
            "VRAM growth of the fixture conftest.py::model above *: allocated 40.1* MiB *",
            "the fixture conftest.py::model grew",
            "b.json: 10 the same",
        ),
        failed=1,
    ),
    "a fixture that grew, and its tests": Tree(
        {"take(32)": "take(64)", "take(4)": "take(40)", "take(5)\n": "take(50)\n"},
        ("the fixture conftest.py::model grew; because of it, *: *test_one*",),
        failed=1,
    ),
    "a fixture of function scope that grew": Tree(
        {"take(2)": "take(12)"},
        (
            "the fixture conftest.py::batch grew; because of it, and so not failures "
            "of their own: test_a.py::test_two, test_a.py::test_three",
        ),
        failed=1,
    ),
    "a fixture that is new": Tree(
        {
            "batch():": "new(): return take(8)\n\n        @pytest.fixture\n"
            "        def batch(new):"
        },
        ("the fixture conftest.py::new is new, and its tests need more than *",),
        failed=1,
        is_inert=True,
    ),
    "a test moved to the CPU": Tree(
        {"take(9)": "torch.zeros(9)"},
        (
            "stale: test_b.py::test_free no longer uses a card",
            "b.json: 1 of its tests used no card in this run: test_b.py::test_free; *",
        ),
        is_inert=True,
    ),
    "a new test": Tree(
        {"def test_free": "def test_new(take): take(99)\n\n        def test_free"},
        ("b.json: 1 tests or fixtures use the card and have no figures in it: *new*",),
        is_inert=True,
    ),
    "a renamed test": Tree(
        {"test_free": "test_called_otherwise"},
        (
            "test_b.py::test_called_otherwise has the figures of test_b.py::test_free*",
            "b.json: 1 tests or fixtures use the card and have no figures in it: *",
        ),
        is_inert=True,
    ),
    "torch updated": Tree(
        lines=(
            f"b.json has no figures of torch {MINOR} for 10 tests on *; they were "
            "compared with those of torch 1.9: torch itself changed nothing; write *",
        ),
        is_inert=True,
        torch_moved=0,
    ),
    "torch updated, which moves all tests": Tree(
        lines=("*with those of torch 1.9: torch itself changed allocated +512 KiB*",),
        is_inert=True,
        torch_moved=MIB // 2,
    ),
    "torch updated, and a regression": Tree(
        {"take(4)": "take(8)"},
        (
            "VRAM growth above the baseline b.json, with torch 1.9: allocated 4 MiB -> *",
            "*with those of torch 1.9: torch itself changed allocated +512 KiB*",
        ),
        failed=1,
        is_inert=True,
        torch_moved=MIB // 2,
    ),
    "a partial run": Tree(
        options=("-k", "second or multiplies"),
        lines=("b.json: 2 the same",),
    ),
    "a run of one test": Tree(
        options=("test_a.py::test_late",), lines=("b.json: 1 the same",)
    ),
    "files in another order": Tree(
        options=("test_b.py", "test_a.py"), lines=("b.json: 10 the same",)
    ),
    "two workers": Tree(options=("-n", "2"), lines=("b.json: 10 the same",)),
}


#: The project's, written once.
_BASELINE: list[bytes] = []


@pytest.fixture
def project(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Write the project with its baseline; return what runs a change of it."""

    def run(edits: Mapping[str, str], *options: str) -> pytest.RunResult:
        for name, text in FILES.items():
            changed = text
            for old, new in edits.items():
                changed = changed.replace(old, new)
            pytester.makepyfile(**{name: changed})
        return pytester.runpytest(*OPTIONS, "--gpu-baseline=b.json", *options)

    file = pytester.path / "b.json"
    if _BASELINE:
        file.write_bytes(_BASELINE[0])
    else:
        run({}, "--gpu-update-baseline")
        _BASELINE.append(file.read_bytes())
    return run


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(each, marks=pytest.mark.slow) if each == "two workers" else each
        for each in TREES
    ],
)
def test_a_changed_tree_has_the_verdict_of_a_reviewer(
    name: str, project: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    """One cause is one failure; what holds nothing fails a strict run alone."""
    tree = TREES[name]
    if tree.torch_moved is not None:
        _age(pytester, tree.torch_moved)

    result = project(tree.edits, *tree.options, "--gpu-strict")

    counts = result.parseoutcomes()
    assert (tree.failed, tree.errors + tree.is_inert) == (
        counts.get("failed", 0),
        counts.get("errors", 0),
    )
    assert (result.ret != 0) == bool(tree.failed + tree.errors + tree.is_inert)
    result.stdout.fnmatch_lines_random(list(tree.lines))
    said = (
        "GPU memory: not everything that was requested was done" in result.stdout.str()
    )
    assert tree.is_inert == said


def test_what_stays_with_a_fixture_grows_with_it(pytester: pytest.Pytester) -> None:
    """Gradients of a wider model are the model's doing; what else stays is a leak."""
    text = """
        import pytest
        import torch

        LEFT = []

        @pytest.fixture(scope="module")
        def model():
            return torch.nn.Linear(256, WIDTH, bias=False).to("cuda")

        def test_trains(model):
            model(torch.ones(2, 256, device="cuda")).sum().backward()
            KEEP
        """
    options = (*OPTIONS, "--gpu-baseline=b.json")

    def run(width: int, keep: str, *more: str) -> dict[str, int]:
        changed = text.replace("WIDTH", str(width)).replace("KEEP", keep)
        pytester.makepyfile(test_it=changed)
        return pytester.runpytest(*options, *more).parseoutcomes()

    run(1024, "pass", "--gpu-update-baseline")

    assert {"passed": 1, "failed": 1} == run(2048, "pass")
    kept = "LEFT.append(torch.zeros(2**20, device='cuda'))"
    assert {"passed": 1, "failed": 1, "errors": 1} == run(2048, kept)


@pytest.mark.parametrize(
    ("settings", "is_strict"),
    [
        (("auto", ""), False),
        (("auto", "0"), False),
        (("auto", "true"), True),
        (("false", "true"), False),
        (("false", "", "--gpu-strict"), True),
        (("true", ""), True),
    ],
)
def test_a_run_is_strict_where_somebody_says_so(
    settings: tuple[str, ...],
    is_strict: bool,  # noqa: FBT001  # pytest gives it by name
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command line, the ini file, CI; else it is said, and the run passes."""
    ini, variable, *option = settings
    monkeypatch.setenv("CI", variable)
    pytester.makeini(f"[pytest]\ngpu_strict = {ini}\n")
    pytester.makepyfile("def test_it(): pass")
    Baseline().write(pytester.path / "b.json")

    result = pytester.runpytest(
        *OPTIONS[:-1], "--gpu-backend=off", "--gpu-baseline=b.json", *option
    )

    assert is_strict == (result.ret == pytest.ExitCode.TESTS_FAILED)
    result.stdout.fnmatch_lines(
        ["b.json: nothing was compared with it, as the backend is off *"]
    )
    result.assert_outcomes(passed=1, errors=int(is_strict))


def _age(pytester: pytest.Pytester, moved: int) -> None:
    """Make the baseline that of an earlier torch, with so many bytes less in each test."""
    file = pytester.path / "b.json"
    document: dict[str, Any] = json.loads(file.read_text("utf-8"))
    for part in ("peaks", "fixtures"):
        ((environment, entries),) = document[part].items()
        head = environment.rpartition(" ")[0]
        for figures in entries.values() if part == "peaks" else ():
            figures["allocated growth"] -= moved
        document[part] = {f"{head} 1.9": entries}
    file.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_order_selection_and_splits_change_no_verdict(
    seed: int, project: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    """With module fixtures, caches and a leak; neither of the right tree nor of one bug.

    Bytes have to be the same, reserved ones too.
    """
    draw = random.Random(seed)  # noqa: S311  # no secret
    tests = [
        f"{file}.py::{line.split()[1].partition('(')[0]}"
        for file, text in FILES.items()
        for line in text.splitlines()
        if line.strip().startswith("def test_")
    ]
    draw.shuffle(tests)
    cut = draw.randrange(1, len(tests))
    exact = ("--gpu-compare-fail=allocated:0%", "--gpu-compare-fail=reserved:0%")
    for part in (tests[:cut], tests[cut:], tests):
        same = project({}, *exact, "--gpu-strict", *part)
        worse = project({"take(6)": "take(11)"}, *exact, *part)

        same.assert_outcomes(passed=len(part))
        assert 0 == same.ret
        same.stdout.fnmatch_lines([f"b.json: {len(part)} the same"])
        is_in = "test_a.py::test_two" in part
        worse.assert_outcomes(passed=len(part) - is_in, failed=is_in)
    before = (pytester.path / "b.json").read_bytes()
    project({}, "--gpu-update-baseline", *tests)
    assert before == (pytester.path / "b.json").read_bytes()
