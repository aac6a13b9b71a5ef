"""Sweeps through pytest: markers, options, fixture, subtests, shards, replays."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported
from ways import WORKERS

from pytest_gpumem.plugin import sweep_progress

pytest_plugins = ["pytester"]

CODE = """
    import pytest
    import torch
    from torch import nn

    KEPT = []

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))

    def infer():
        return model().cuda()(torch.ones(4, 32).cuda()).cpu()

    def recover():
        try:
            return infer()
        except torch.OutOfMemoryError:
            pass
        return model()(torch.ones(4, 32))

    def leak():
        net = model()
        try:
            return net.cuda()(torch.ones(4, 32).cuda()).cpu()
        except torch.OutOfMemoryError as error:
            KEPT.append(error)
        return model()(torch.ones(4, 32))
"""
MARKED = (
    CODE
    + """
    @pytest.mark.oom_sweep(recover=True)
    def test_good():
        assert recover().shape == (4, 8)

    @pytest.mark.oom_sweep
    def test_bad():
        leak()
"""
)
LIGHT = ("-p", "no:cacheprovider")
#: Whether each failing point is a failure of its own, as pytest can tell since 9.
EACH = int(hasattr(pytest, "Subtests"))


@pytest.fixture
def make(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with the marked tests."""
    pytester.makepyfile(MARKED)
    return pytester


def test_a_marked_test_runs_once_for_each_allocation(make: pytest.Pytester) -> None:
    """A good fallback passes; a leak fails with its holder and its replay."""
    result = make.runpytest(*LIGHT)

    result.assert_outcomes(passed=1, failed=1 + 14 * EACH)
    result.stdout.fnmatch_lines_random(
        [
            "*allocation 2, transient, native: leak",
            "*stay on the card",
            "*local * of *traceback, OutOfMemoryError*global 'KEPT' of *",
            "*replay: pytest *::test_bad --gpu-replay-oom=any:nth=2",
            "test_bad does not survive 14 of 16 faults",
            "*leak at *test_a_marked*.py:* in leak (load)*",
            "*= OOM sweeps =*",
            "*::test_good: 8 allocations at * site*, 16 points: 16 recovered (*",
            "*::test_bad: 8 allocations at * site*, 16 points: 2 recovered, 14 leak (*",
        ]
    )


def test_every_failing_point_prints_a_line_that_replays_it(
    make: pytest.Pytester,
) -> None:
    """The printed command runs that point, and fails in the same way."""
    printed = make.runpytest(*LIGHT, "-k", "bad").stdout.str()
    lines = re.findall(r"pytest (\S+) (--gpu-replay-oom=\S+)", printed)
    nodeid, option = lines[5]
    result = make.runpytest(*LIGHT, nodeid, option)

    assert 14 == len(set(lines))
    result.assert_outcomes(failed=1 + EACH)
    result.stdout.fnmatch_lines(["*::test_bad: * 1 point: 1 leak*"])


def test_a_replay_that_reaches_nothing_fails(make: pytest.Pytester) -> None:
    """A line of an older version of the code says that it proves nothing."""
    result = make.runpytest(*LIGHT, "-k", "good", "--gpu-replay-oom=any:nth=99")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*no allocation of this test was failed by it*"])


def test_a_test_that_fails_by_itself_fails_as_ever(pytester: pytest.Pytester) -> None:
    """Its own assertion is shown, not a sweep's."""
    pytester.makepyfile(
        """
        import pytest
        import torch

        @pytest.mark.oom_sweep
        def test_wrong():
            assert torch.ones(4, device="cuda").sum() == 5
        """
    )
    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *AssertionError: assert tensor(4.*", "*.py:*: AssertionError"]
    )


def test_an_assertion_broken_by_a_fault_is_a_wrong_result(
    pytester: pytest.Pytester,
) -> None:
    """What the test asserts is what every run must keep."""
    pytester.makepyfile(
        """
        import pytest
        import torch

        @pytest.mark.oom_sweep(modes=["transient"])
        def test_wrong():
            try:
                total = torch.ones(4, device="cuda").sum()
            except torch.OutOfMemoryError:
                total = 0
            assert total == 4
        """
    )
    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(failed=1 + 2 * EACH)
    result.stdout.fnmatch_lines(["*allocation 1, transient, native: wrong result"])


def test_fallback_tests_are_swept_on_demand(pytester: pytest.Pytester) -> None:
    """Such a test runs once, and once for each allocation with --gpu-oom-sweep."""
    pytester.makepyfile(
        CODE
        + """
    @pytest.mark.oom_sweep(recover=True, on_demand=True)
    def test_it():
        recover()
"""
    )
    once = pytester.runpytest(*LIGHT)
    # The word after the option is a folder of tests, not its value.
    swept = pytester.runpytest(*LIGHT, "--gpu-oom-sweep", ".")
    chosen = pytester.runpytest(*LIGHT, "--gpu-oom-sweep=1")
    chosen.assert_outcomes(passed=1)
    chosen.stdout.fnmatch_lines(["*::test_it: *, 2 points: * recovered*"])

    once.assert_outcomes(passed=1)
    assert "OOM sweeps" not in once.stdout.str()
    swept.assert_outcomes(passed=1)
    swept.stdout.fnmatch_lines(
        ["*::test_it: 8 allocations at * site*, * points: * recovered (*"]
    )


def test_the_fixture_sweeps_a_function(pytester: pytest.Pytester) -> None:
    """oom_sweep(...) returns the report, and fails the test if a point ended badly."""
    pytester.makepyfile(
        CODE
        + """
    def test_good(oom_sweep):
        report = oom_sweep(recover, recover=True, modes=["transient"])
        assert report.num_allocations == 8

    def test_bad(oom_sweep):
        oom_sweep(infer, recover=True, points=2)
"""
    )
    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(passed=1, failed=1 + 4 * EACH)
    result.stdout.fnmatch_lines(["infer does not recover from 4 of 4 faults"])


@pytest.mark.slow
def test_workers_share_the_points(make: pytest.Pytester) -> None:
    """With pytest-xdist each worker runs its part; the printed replay is for all."""
    result = make.runpytest(*LIGHT, "-n", "2", "-v")
    text = result.stdout.str()

    result.assert_outcomes(passed=2, failed=2 + 14 * EACH)
    result.stdout.fnmatch_lines(
        [
            "*::test_good: 8 allocations at 3 sites, 16 points: 16 recovered (*",
            "*allocates  failed  recovered  site",
            "*4       8          8  *.py:* in infer (load)*",
        ]
    )
    assert re.search(r"replay: pytest \S+::test_bad --gpu-replay-oom=any:nth=2\b", text)


@pytest.mark.parametrize("workers", WORKERS)
def test_shares_are_told_from_a_tests_own_parameters(
    pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    """Whatever they are called, and wherever pytest puts the share among them."""
    pytester.makepyfile(
        CODE
        + """
    def pytest_generate_tests(metafunc):
        if "late" in metafunc.fixturenames:
            metafunc.parametrize("late", ["points 1 of 2"], ids=["points 1 of 2"])

    @pytest.mark.oom_sweep(recover=True, modes=("transient",))
    @pytest.mark.parametrize("n", ["points 3"])
    def test_it(n, late):
        recover()
"""
    )
    result = pytester.runpytest(*LIGHT, *workers)

    lines = [each for each in result.outlines if ": 8 allocations at" in each]
    (name,) = {each.partition(": 8 ")[0].strip() for each in lines}
    assert name.endswith(("[points 3-points 1 of 2]", "[points 1 of 2-points 3]"))
    assert "8 points: 8 recovered" in "".join(lines)


def test_coverage_is_shown(make: pytest.Pytester) -> None:
    """The sites that allocate, were failed, and were recovered from."""
    result = make.runpytest(*LIGHT, "-k", "good")

    result.stdout.fnmatch_lines(
        [
            "*allocates  failed  recovered  site",
            "*4       8          8  *.py:* in infer (load)*",
        ]
    )


@pytest.mark.parametrize("has_subtests", [True, False], ids=["subtests", "pytest 8"])
def test_long_sweeps_say_how_far_they_are(
    make: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, *, has_subtests: bool
) -> None:
    """Without -v too; before pytest 9 the failing points are in one failure."""
    monkeypatch.setattr(sweep_progress, "EVERY_S", {True: 0.0, False: 0.0})
    if not has_subtests:
        monkeypatch.delattr(pytest, "Subtests", raising=False)
    result = make.runpytest(*LIGHT)

    failing = 14 * EACH if has_subtests else 0
    result.assert_outcomes(passed=1, failed=1 + failing)
    result.stdout.fnmatch_lines(
        [
            "*::test_good: 2 of 16 points",
            "*::test_bad: 8 of 16 points, 7 failing",
            "test_bad does not survive 14 of 16 faults",
        ]
    )
    for number in range(2, 9):
        assert f"test_bad --gpu-replay-oom=any:nth={number}\n" in result.stdout.str()


def test_junit_has_the_sweep(make: pytest.Pytester) -> None:
    """A property of the test case holds what was found."""
    make.runpytest(*LIGHT, "-k", "good", "--junit-xml=junit.xml")
    root = ET.parse(make.path / "junit.xml").getroot()  # noqa: S314  # our own
    properties = {
        each.get("name"): str(each.get("value")) for each in root.iter("property")
    }

    assert 16 == json.loads(properties["gpumem.sweep"])["points"]
    assert "gpumem.sweep-progress" not in properties


def test_an_interrupted_sweep_is_resumed_on_demand(pytester: pytest.Pytester) -> None:
    """--gpu-oom-resume goes on where the run before was interrupted."""
    pytester.makepyfile(
        CODE
        + """
    import pathlib

    RUNS = pathlib.Path("runs")

    @pytest.mark.oom_sweep
    def test_it():
        count = int(RUNS.read_text()) if RUNS.exists() else 0
        RUNS.write_text(str(count + 1))
        if count == 7:
            raise KeyboardInterrupt
        recover()
"""
    )
    first = pytester.runpytest_inprocess(no_reraise_ctrlc=True)
    second = pytester.runpytest("--gpu-oom-resume")

    assert pytest.ExitCode.INTERRUPTED == first.ret
    first.stdout.fnmatch_lines(
        [
            "*KeyboardInterrupt: a sweep of *::test_it was interrupted after 5 of 16 "
            "points; go on with --gpu-oom-resume"
        ]
    )
    second.assert_outcomes(passed=1)
    second.stdout.fnmatch_lines(["*16 points, 5 of them resumed: 16 recovered*"])


def test_old_spellings_of_sweeps_work_with_a_warning(
    pytester: pytest.Pytester,
) -> None:
    """The marker, the option, and an action in the ini file."""
    pytester.makepyfile(
        CODE
        + """
    @pytest.mark.oom_fallback
    def test_it():
        recover()

    @pytest.mark.oom_fallback
    def test_other():
        recover()
"""
    )
    pytester.makeini("[pytest]\ngpu_oom_sweep = true\ngpu_oom_resume = false\n")

    swept = pytester.runpytest(*LIGHT, "--gpu-oom-points=1")

    swept.assert_outcomes(passed=2, warnings=3)
    swept.stdout.fnmatch_lines(["*::test_it: *, 2 points: * recovered*"])
    swept.stdout.fnmatch_lines_random(
        [
            "*oom_fallback(...) is now oom_sweep(recover=True, on_demand=True, ...)*",
            "*--gpu-oom-points is now --gpu-oom-sweep=POINTS*",
            "*gpu_oom_resume in the ini file: put --gpu-oom-resume on the command line*",
        ]
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("@pytest.mark.oom_sweep(on_demand=1)", "*on_demand=1; give True or False*"),
        ("@pytest.mark.oom_sweep('few')", "*oom_sweep: points='few'; accepted are*"),
        ("@pytest.mark.oom_sweep(only='any:nth=1')", "*only is for the run to choose*"),
        ("@pytest.mark.oom_fallback(mode='once')", "*unexpected keyword*'mode'*"),
        ("@pytest.mark.oom_sweep(rule='lo')", "*'lo' is not a phase*"),
    ],
)
def test_markers_are_checked_early(
    pytester: pytest.Pytester, source: str, message: str
) -> None:
    """Exit 4 before any test runs."""
    pytester.makepyfile(f"import pytest\n{source}\ndef test_it():\n    pass")
    result = pytester.runpytest(*LIGHT)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([message])


@pytest.mark.parametrize(
    "source",
    [
        "async def test_it():\n    pass",
        "class TestIt(unittest.TestCase):\n    def test_it(self):\n        pass",
    ],
)
def test_what_cannot_be_called_again_is_refused(
    pytester: pytest.Pytester, source: str
) -> None:
    """The test's error names what to use instead; other tests run."""
    pytester.makepyfile(
        f"import unittest, pytest\npytestmark = pytest.mark.oom_sweep\n{source}\n",
        test_other="def test_other(): pass",
    )
    result = pytester.runpytest(*LIGHT)

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*needs a plain test function*fixture oom_sweep*"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--gpu-oom-sweep=few",
            "*--gpu-oom-sweep: 'few' is neither all, sites, ends nor*",
        ),
        ("--gpu-oom-sweep=0", "*--gpu-oom-sweep: '0' is neither*"),
        ("--gpu-replay-oom=what", "*--gpu-replay-oom:*'what' is not a phase*"),
    ],
)
def test_options_are_checked_early(
    pytester: pytest.Pytester, option: str, message: str
) -> None:
    """Exit 4, and what is accepted."""
    result = pytester.runpytest(*LIGHT, option)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([message])


def test_a_skip_inside_is_a_skip(pytester: pytest.Pytester) -> None:
    """A test that skips itself is skipped, not swept."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.oom_sweep
        def test_it():
            pytest.skip("not today")
        """
    )
    pytester.runpytest(*LIGHT).assert_outcomes(skipped=1)
