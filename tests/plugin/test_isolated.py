"""Tests in processes of their own."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported

pytest_plugins = ["pytester"]

SUITE = """
import os

import pytest
import torch

KEPT = []


@pytest.fixture(scope="module")
def table():
    yield torch.ones(2**20, device="cuda")
    print("ended in", os.getpid())


def test_before(table):
    KEPT.append(torch.ones(3 * 2**20, device="cuda"))


@pytest.mark.gpu_isolated
@pytest.mark.max_vram("4MiB")
@pytest.mark.parametrize("name", ["a b/c::d"])
def test_limited(table, name, tmp_path):
    assert torch.cuda.memory_allocated() == 4 * 2**20
    assert not KEPT
    print("a word")
    KEPT.append(torch.ones(2**18, device="cuda"))


@pytest.mark.gpu_isolated
def test_dies():
    os._exit(3)


def test_after(table):
    assert len(KEPT) == 1
    assert torch.cuda.memory_allocated() == 16 * 2**20
"""


def test_a_test_is_alone_in_its_process(pytester: pytest.Pytester) -> None:
    """What it keeps goes; figures, limits, output and an early end come to the run."""
    pytester.makepyfile(SUITE)

    result = pytester.runpytest(
        *("-p", "no:cacheprovider", "--gpu-backend=simulated"),
        *("--gpu-report=json:r.json", "--junitxml=junit.xml"),
    )
    report = json.loads((pytester.path / "r.json").read_text("utf-8"))
    tests = {each["nodeid"].partition("::")[2]: each for each in report["tests"]}
    cases = ET.parse(pytester.path / "junit.xml").iter("testcase")  # noqa: S314  # our own file

    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "test_*.py .VF. *",
            "peak VRAM above max_vram: allocated 5 MiB *",
            "first over the limit at test_*.py:* in test_limited *",
            "*Captured stdout call*",
            "a word",
            "the process of this test ended before the test did, with exit code 3",
            "*== GPU memory ==*",
            "*test_a_test_is_alone_in_its_process.py::test_before",
        ]
    )
    limited = "test_limited[a b/c::d]"
    assert tests.keys() == {"test_before", limited}
    (call,) = (each for each in tests[limited]["figures"] if each["phase"] == "call")
    assert call["peak_allocated_bytes"] == 5 * 2**20
    assert tests[limited]["timeline"]
    assert len(list(cases)) == 4
    assert not list(pytester.path.glob("isolated*"))


@pytest.mark.slow
def test_a_module_that_only_it_uses_next_is_torn_down(
    pytester: pytest.Pytester,
) -> None:
    """Before the next module's tests; an error of that is shown."""
    pytester.makepyfile(
        test_a="""
        import pytest

        @pytest.fixture(scope="module")
        def ends():
            yield
            raise ValueError("the end of a")

        def test_first(ends):
            pass

        @pytest.mark.gpu_isolated
        def test_isolated():
            pass
        """,
        test_b="def test_last(): pass",
    )

    result = pytester.runpytest("-p", "no:cacheprovider", "--gpu-backend=simulated")

    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(["E*ValueError: the end of a"])


@pytest.mark.slow
def test_rules_skips_and_properties_are_seen(pytester: pytest.Pytester) -> None:
    """A rule that is reached only there was reached; a property may have any value."""
    pytester.makepyfile(
        """
        import pytest
        import torch

        @pytest.mark.gpu_isolated
        def test_it(record_property):
            record_property("loss", float("nan"))
            record_property("of", torch.float16)
            with pytest.raises(torch.OutOfMemoryError):
                torch.ones(2, device="cuda")
            pytest.skip("enough")
        """
    )

    result = pytester.runpytest(
        *("-p", "no:cacheprovider", "-rs", "--gpu-inject-oom=any:nth=1"),
        "--junitxml=junit.xml",
    )
    properties = ET.parse(pytester.path / "junit.xml").iter("property")  # noqa: S314  # our own file

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED *: enough"])
    assert {("loss", "nan"), ("of", "torch.float16")} <= {
        (each.get("name"), each.get("value")) for each in properties
    }
    result.stdout.no_fnmatch_line("*never reached*")


@pytest.mark.parametrize("option", ["--pdb", "--trace"])
def test_a_debugger_is_refused(pytester: pytest.Pytester, option: str) -> None:
    """It cannot reach another process."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu_isolated
        def test_it():
            pass
        """
    )

    result = pytester.runpytest("--gpu-backend=simulated", option)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    text = result.stdout.str() + result.stderr.str()
    assert f"@pytest.mark.gpu_isolated: {option} cannot reach" in text


def test_a_time_limit_of_the_run_ends_the_process(pytester: pytest.Pytester) -> None:
    """As pytest-timeout raises it: a failure in the middle of the wait."""
    pytester.makeconftest(
        """
        import signal

        import pytest

        def fail(*_):
            pytest.fail("Timeout (>0.5s)")

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(item):
            if item.name == "test_waits":
                signal.signal(signal.SIGALRM, fail)
                signal.setitimer(signal.ITIMER_REAL, 0.5)
            return (yield)
        """
    )
    pytester.makepyfile(
        """
        import time

        import pytest

        @pytest.mark.gpu_isolated
        def test_waits():
            time.sleep(100)

        def test_next():
            pass
        """
    )

    result = pytester.runpytest("-p", "no:cacheprovider", "--gpu-backend=simulated")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["Timeout (>0.5s)"])


@pytest.mark.slow
def test_workers_and_sweeps(pytester: pytest.Pytester) -> None:
    """Each point is run once, in one of the workers' processes; groups keep their names."""
    pytester.makepyfile(
        """
        import pytest
        import torch

        @pytest.mark.gpu_isolated
        @pytest.mark.xdist_group("g")
        def test_grouped():
            torch.ones(2**20, device="cuda")

        @pytest.mark.gpu_isolated
        @pytest.mark.oom_sweep
        def test_swept():
            for _ in range(3):
                torch.ones(2**20, device="cuda")
        """
    )

    result = pytester.runpytest_subprocess(
        "-n2", "--dist=loadgroup", "--gpu-backend=simulated"
    )

    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        [
            "*::test_grouped*",
            "*test_swept: 3 allocations at 1 site, 6 points: 6 clean *",
        ]
    )
