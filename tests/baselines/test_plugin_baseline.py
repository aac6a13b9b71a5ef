"""The gate on committed peaks, as a run of pytest shows it, with workers and without."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ways import WAYS, WORKERS

from pytest_gpumem.baselines.baseline import Baseline

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["pytester"]

MINOR = ".".join(torch.__version__.split("+")[0].split(".")[:2])
T4 = f"Tesla T4, simulated, torch {MINOR}"
TESTS = """
    import pytest
    import torch

    def take(mib):
        torch.zeros(mib * 2**18, device="cuda")

    def test_one():
        take(1)

    @pytest.mark.parametrize("mib", [2, 4])
    def test_many(mib):
        take(mib)

    def test_no_card():
        pass
"""


@pytest.fixture(params=["junit", pytest.param("both", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, pytester: pytest.Pytester) -> Any:
    """Run tests in one of the ways, against a baseline."""

    def run(code: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=code)
        return pytester.runpytest(
            "-p",
            "no:cacheprovider",
            "--gpu-baseline=b.json",
            *WAYS[request.param],
            *options,
        )

    return run


def peaks(pytester: pytest.Pytester) -> dict[str, Any]:
    """Return what the file holds."""
    document: dict[str, Any] = json.loads((pytester.path / "b.json").read_text("utf-8"))
    return dict(document["peaks"])


def test_a_baseline_is_written_and_held(
    run: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    """The same code passes; more fails that test, and says what to do; less is said."""
    written = run(TESTS, "--gpu-update-baseline")
    first = (pytester.path / "b.json").read_text("utf-8")
    again = run(TESTS, "--gpu-update-baseline")
    same = run(TESTS)
    more = run(
        TESTS.replace("take(1)", "take(3)").replace("[2, 4]", "[2, 3, 4]"),
        "--gpu-compare-fail=allocated:1%",
    )
    less = run(
        TESTS.replace("take(mib)\n\n    def test_no", "take(1)\n\n    def test_no")
    )

    written.assert_outcomes(passed=4)
    written.stdout.fnmatch_lines(["*b.json written: 3 tests"])
    again.stdout.fnmatch_lines(["*b.json unchanged: 3 tests"])
    assert first == (pytester.path / "b.json").read_text("utf-8")
    assert {
        "allocated": 2**20,
        "allocated before": 0,
        "allocated growth": 2**20,
        "requested growth": 2**20,
        "reserved": 2 * 2**20,
        "reserved before": 0,
        "reserved growth": 2 * 2**20,
    } == peaks(pytester)[T4]["test_it.py::test_one"]
    assert [
        f"test_it.py::test_{each}" for each in ("many[2]", "many[4]", "one")
    ] == list(peaks(pytester)[T4])
    same.assert_outcomes(passed=4)
    same.stdout.fnmatch_lines(["*b.json: 3 the same"])
    more.assert_outcomes(passed=4, failed=1)
    more.stdout.fnmatch_lines_random(
        [
            "VRAM growth above the baseline *b.json: allocated 1 MiB -> 3 MiB *+200.0 %)",
            "allowed is allocated:1% more; if this is meant, run again with *",
            "test_it.py::test_one: allocated 1 MiB -> 3 MiB (+2 MiB, +200.0 %)",
            "*b.json: 2 the same, 1 changed, 1 new",
        ]
    )
    less.assert_outcomes(passed=4)
    less.stdout.fnmatch_lines(
        ["test_it.py::test_many[[]4]: allocated 4 MiB -> 1 MiB *"]
    )


def test_only_what_passes_and_is_there_is_written(
    run: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    """A failed test keeps its figures; one that is gone is dropped; a part is merged."""
    run(TESTS, "--gpu-update-baseline")
    before = peaks(pytester)[T4]
    chosen = run(
        TESTS.replace("take(1)", "take(8)").replace("take(mib)\n\n", "take(9)\n\n"),
        "--gpu-update-baseline",
        "-k",
        "test_one",
    )
    part = peaks(pytester)[T4]
    changed = TESTS.replace("[2, 4]", "[2]").replace(
        "take(1)", "take(16); raise ValueError"
    )
    stale = run(changed)
    dropped = run(changed, "--gpu-update-baseline")

    chosen.assert_outcomes(
        passed=1, deselected=chosen.parseoutcomes().get("deselected", 0)
    )
    assert 8 * 2**20 == part["test_it.py::test_one"]["allocated"]
    assert before["test_it.py::test_many[4]"] == part["test_it.py::test_many[4]"]
    stale.stdout.fnmatch_lines(["stale: test_it.py::test_many[[]4] no longer exists"])
    dropped.assert_outcomes(passed=2, failed=1)
    dropped.stdout.fnmatch_lines(
        ["*b.json written: 1 test, 1 stale dropped, 1 that failed left as they were"]
    )
    last = peaks(pytester)[T4]
    assert {"test_it.py::test_many[2]", "test_it.py::test_one"} == set(last)
    assert part["test_it.py::test_one"] == last["test_it.py::test_one"]


@pytest.mark.parametrize("run", ["plain"], indirect=True)
def test_tolerances_are_chosen(run: Callable[..., pytest.RunResult]) -> None:
    """By share or bytes, for each metric; several at once."""
    run(TESTS, "--gpu-update-baseline")
    grown = TESTS.replace("take(1)", "take(11)")
    ample = run(grown, "--gpu-compare-fail=allocated:11MiB")
    tight = run(grown, "--gpu-compare-fail=allocated:10MiB")
    reserved = run(
        grown, "--gpu-compare-fail=allocated:2000%", "--gpu-compare-fail=reserved:1MiB"
    )

    ample.assert_outcomes(passed=4)
    tight.assert_outcomes(passed=3, failed=1)
    reserved.assert_outcomes(passed=3, failed=1)
    reserved.stdout.fnmatch_lines(["*above the baseline *: reserved 2 MiB -> 12 MiB *"])


@pytest.mark.parametrize("run", ["plain", "junit"], indirect=True)
def test_another_card_has_figures_of_its_own(
    run: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    """A run on a card that the file does not know says so, and gates nothing."""
    run(TESTS, "--gpu-update-baseline")
    other = run(TESTS, "--gpu-card=A100-80GB")
    run(TESTS, "--gpu-card=A100-80GB", "--gpu-update-baseline")

    other.assert_outcomes(passed=4)
    other.stdout.fnmatch_lines(
        [f"*b.json has no figures for NVIDIA A100*(it has: {T4}), so nothing was *"]
    )
    assert 2 == len(peaks(pytester))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a baseline of pytest-gpumem"),
        ('{"format": "pytest-gpumem baseline", "version": 9}', "has format version 9"),
        (
            '{"format": "pytest-gpumem baseline", "version": 1, "peaks": 3}',
            "is damaged",
        ),
        (None, "does not exist; write it with --gpu-update-baseline"),
    ],
)
@pytest.mark.parametrize("workers", WORKERS)
def test_a_file_that_cannot_be_used_ends_the_run(
    pytester: pytest.Pytester, text: str | None, words: str, workers: tuple[str, ...]
) -> None:
    """Before any test, with exit code 4; the file is untouched, even by an update."""
    pytester.makepyfile("raise AssertionError")
    file = pytester.path / "b.json"
    updates: list[tuple[str, ...]] = [(), ("--gpu-update-baseline",)]
    if text is None:
        updates.pop()
    else:
        file.write_text(text, encoding="utf-8")
    for update in updates:
        result = pytester.runpytest("--gpu-baseline=b.json", *workers, *update)

        assert pytest.ExitCode.USAGE_ERROR == result.ret
        result.stderr.fnmatch_lines([f"*--gpu-baseline: *b.json {words}*"])
        if text is not None:
            assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu-update-baseline"], "which file? name it with --gpu-baseline=FILE"),
        (
            ["--gpu-compare-fail=peak:1%"],
            "'peak' is not a metric; accepted are allocated,",
        ),
        (["--gpu-compare-fail=allocated:lots"], "'allocated:lots': *lots*"),
        (
            ["--gpu-compare-fail=allocated:5%"],
            "nothing to compare with; name it with --gpu-baseline=FILE",
        ),
    ],
)
def test_options_that_make_no_sense_end_the_run(
    pytester: pytest.Pytester, options: list[str], words: str
) -> None:
    """With exit code 4."""
    result = pytester.runpytest(*options)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"*{words}*"])


def test_the_ini_file_may_say_what_runs_that_compare_let_pass(
    pytester: pytest.Pytester,
) -> None:
    """A run without a baseline compares nothing, and need not."""
    pytester.makeini("[pytest]\ngpu_compare_fail = allocated:5%\n")
    pytester.makepyfile(test_it=TESTS)

    assert pytest.ExitCode.OK == pytester.runpytest("-p", "no:cacheprovider").ret


def test_the_ini_files_path_starts_at_the_ini_file(pytester: pytest.Pytester) -> None:
    """Wherever pytest is run from."""
    pytester.makeini("[pytest]\ngpu_baseline = b.json\n")
    pytester.makepyfile(test_it=TESTS)
    inner = pytester.mkdir("inner")
    pytester.runpytest("--gpu-update-baseline", "-p", "no:cacheprovider")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inner)
        result = pytester.runpytest("..", "-p", "no:cacheprovider")

    result.stdout.fnmatch_lines(["*b.json: 3 the same"])


def test_what_is_skipped_or_left_out_is_kept(pytester: pytest.Pytester) -> None:
    """It is there still: on another machine, in another shard, it runs."""
    options = ("-p", "no:cacheprovider", "--gpu-baseline=b.json")
    pytester.makepyfile(test_it=TESTS)
    pytester.runpytest(*options, "--gpu-update-baseline")
    before = (pytester.path / "b.json").read_text("utf-8")
    pytester.makeconftest(
        """
        def pytest_collection_modifyitems(config, items):
            config.hook.pytest_deselected(items=items[1:])
            del items[1:]
        """
    )
    pytester.makepyfile(
        test_it=TESTS.replace("def test_one", "@pytest.mark.skip\n    def test_one")
    )

    compared = pytester.runpytest(*options)
    pytester.runpytest(*options, "--gpu-update-baseline")

    compared.stdout.no_fnmatch_line("*stale*")
    assert before == (pytester.path / "b.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "num_lines", "is_more_told"),
    [((), 20, True), (("-v",), 25, False), (("-q",), 0, False)],
)
def test_changes_are_listed_as_far_as_is_asked(
    options: tuple[str, ...],
    num_lines: int,
    is_more_told: bool,  # noqa: FBT001  # pytest gives it by name
    pytester: pytest.Pytester,
) -> None:
    """The largest first; the count is always there."""
    pytester.makepyfile(
        test_it="""
        import pytest
        import torch

        @pytest.mark.parametrize("n", range(25))
        def test_it(n):
            torch.zeros((n + 1) * 2**18, device="cuda")
        """
    )
    peaks = {f"test_it.py::test_it[{n}]": {"allocated": 2**30} for n in range(25)}
    Baseline({T4: peaks}).write(pytester.path / "b.json")

    done = pytester.runpytest(
        "-p", "no:cacheprovider", "--gpu-baseline=b.json", *options
    )

    lines = [line for line in done.outlines if "allocated 1 GiB -> " in line]
    assert num_lines == len(lines)
    if lines:
        assert "test_it[0]" in lines[0]
    assert is_more_told == ("... and 5 lines more; -v shows all" in done.outlines)
    done.stdout.fnmatch_lines(["b.json: 25 changed"])


@pytest.mark.parametrize(
    ("end", "options"),
    [
        ("raise KeyboardInterrupt", ()),
        ("pytest.exit('enough')", ()),
        ("assert False", ("-x",)),
        pytest.param(
            "import os; os._exit(1)",
            ("-n", "1", "--max-worker-restart=0"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupted_update_keeps_what_did_not_run(
    end: str, options: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    """However it was interrupted; what ran before is taken in."""
    code = """
        import pytest, torch

        def test_a(): torch.zeros(1, device="cuda")
        def test_b(): torch.zeros(2, device="cuda")
        def test_c(): torch.zeros(3, device="cuda")
        def test_d(): torch.zeros(4, device="cuda")
    """
    common = ("-p", "no:cacheprovider", "--gpu-baseline=b.json")
    pytester.makepyfile(test_it=code)
    pytester.runpytest(*common, "--gpu-update-baseline")
    before = peaks(pytester)[T4]
    changed = code.replace("torch.zeros(1,", "torch.zeros(2**20,")
    pytester.makepyfile(test_it=changed.replace('torch.zeros(2, device="cuda")', end))

    result = pytester.runpytest_inprocess(
        *common, "--gpu-update-baseline", *options, no_reraise_ctrlc=True
    )

    after = peaks(pytester)[T4]
    assert pytest.ExitCode.OK != result.ret
    assert list(before) == list(after)
    assert 4 * 2**20 == after.pop("test_it.py::test_a")["allocated"]
    assert {name: before[name] for name in after} == after


def test_a_test_that_uses_no_card_any_more_leaves_the_file(
    pytester: pytest.Pytester,
) -> None:
    """Also where none is left, and torch is not even imported; others stay."""
    common = ("-p", "no:cacheprovider", "--gpu-baseline=b.json", "--gpu-card=T4")
    Baseline(
        {
            T4: {"test_it.py::test_it": {"allocated": 7}},
            "other": {"test_it.py::test_it": {"allocated": 7}},
        }
    ).write(pytester.path / "b.json")
    pytester.makepyfile(test_it="def test_it(): pass")

    strict = pytester.runpytest(*common, "--gpu-strict")
    updated = pytester.runpytest(*common, "--gpu-update-baseline")

    assert pytest.ExitCode.TESTS_FAILED == strict.ret
    strict.stdout.fnmatch_lines(["b.json: 1 of its tests used no card in this run: *"])
    updated.stdout.fnmatch_lines(["b.json written: 0 tests, 1 stale dropped"])
    assert {"other"} == set(peaks(pytester))


def test_a_file_of_format_1_is_held_to_as_before(pytester: pytest.Pytester) -> None:
    """By absolute peaks, and the run says so; an update writes what a test adds."""
    common = ("-p", "no:cacheprovider", "--gpu-baseline=b.json")
    old = {"format": "pytest-gpumem baseline", "version": 1}
    entries = {"test_it.py::test_one": {"allocated": 2**19, "reserved": 2**21}}
    text = json.dumps({**old, "peaks": {T4: entries}})
    (pytester.path / "b.json").write_text(text, encoding="utf-8-sig")
    pytester.makepyfile(
        test_it="import torch\ndef test_one(): torch.zeros(2**18, device='cuda')"
    )

    compared = pytester.runpytest(*common)
    pytester.runpytest(*common, "--gpu-update-baseline")

    compared.assert_outcomes(failed=1)
    compared.stdout.fnmatch_lines(
        [
            "peak VRAM above the baseline b.json: allocated 512 KiB -> 1 MiB *",
            "b.json has absolute peaks (format 1), which depend on order *",
        ]
    )
    assert 2**20 == peaks(pytester)[T4]["test_it.py::test_one"]["allocated growth"]
