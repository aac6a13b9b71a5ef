"""Limits and leak checks hold every test, wherever torch is imported for the first time."""

from __future__ import annotations

from typing import Final

import pytest
import torch

from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.plugin import session

LIGHT = ("-p", "no:cacheprovider")
CHECKS = ("--gpu-max-vram=1MiB", "--gpu-leak-check")
#: Stands for torch, which cannot be imported twice: the device comes with it.
LATE: Final = """
import torch

def take(mib=4):
    return torch.zeros(mib * 2**18, device="cuda")

kept = []
"""
#: Where the device comes, as a test file whose only test takes 4 MiB.
PLACES: Final = {
    "body": """
        def test_it():
            from late import take
            take()
    """,
    "fixture": """
        import pytest

        @pytest.fixture
        def late():
            import late
            return late

        def test_it(late):
            late.take()
    """,
    "module fixture": """
        import pytest

        @pytest.fixture(scope="module")
        def late():
            import late
            held = late.take(64)  # its own, and not the test's
            yield late
            del held

        def test_it(late):
            late.take()
            torch = __import__("torch")
            assert torch.cuda.memory_allocated() == 64 * 2**20
    """,
    "unittest": """
        import unittest

        class TestIt(unittest.TestCase):
            def test_it(self):
                from late import take
                take()
    """,
    "async": """
        import pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.anyio
        async def test_it():
            from late import take
            take()
    """,
    "subtests": """
        def test_it(subtests):
            with subtests.test("first"):
                from late import take
                take()
    """,
    "parametrized": """
        import pytest

        @pytest.mark.parametrize("mib", [4])
        def test_it(mib):
            from late import take
            take(mib)
    """,
    "thread": """
        import threading

        def body():
            from late import take
            take()

        def test_it():
            thread = threading.Thread(target=body)
            thread.start()
            thread.join()
    """,
}
OVER: Final = (
    "peak VRAM above max_vram: allocated * MiB (* bytes) on cuda:0, limit 1 MiB*"
)


@pytest.fixture(autouse=True)
def _late(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device comes with the module ``late``."""
    monkeypatch.setattr(
        session, "AfterImport", lambda _torch, callback: AfterImport("late", callback)
    )
    pytester.makepyfile(late=LATE)
    assert torch.__version__


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(
            place,
            marks=pytest.mark.skipif(
                place == "subtests" and pytest.version_tuple < (9,),
                reason="subtests came with pytest 9",
            ),
        )
        for place in PLACES
    ],
)
def test_a_limit_holds_where_torch_comes(pytester: pytest.Pytester, place: str) -> None:
    """The first test to use torch is held to it, and no leak is seen in it."""
    pytester.makepyfile(test_it=PLACES[place])

    result = pytester.runpytest(*LIGHT, *CHECKS)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([OVER])
    result.stdout.no_fnmatch_line("*VRAM leak*")


def test_a_doctest_is_held(pytester: pytest.Pytester) -> None:
    """One that imports torch itself."""
    pytester.makepyfile(
        module='''
        def take():
            """Take.

            >>> from late import take
            >>> x = take()
            """
        '''
    )

    result = pytester.runpytest(*LIGHT, *CHECKS, "--doctest-modules", "module.py")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([OVER])


@pytest.mark.parametrize(
    "place", ["body", "fixture", "module fixture", "unittest", "thread"]
)
def test_a_leak_is_found_where_torch_comes(
    pytester: pytest.Pytester, place: str
) -> None:
    """What the test keeps, without what fixtures of wider scope hold."""
    text = PLACES[place].replace("late.take()", "late.kept.append(late.take())")
    text = text.replace(
        "            take()", "            import late; late.kept.append(take())"
    )
    pytester.makepyfile(test_it=text.replace("== 64", "== 68"))

    result = pytester.runpytest(*LIGHT, "--gpu-leak-check")

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["VRAM leak: 4 MiB (4194304 bytes) stay*"])


def test_a_leak_of_a_teardown_is_found(pytester: pytest.Pytester) -> None:
    """Also where torch comes in the teardown."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def late():
            yield
            import late
            late.kept.append(late.take())

        def test_it(late): pass
        """
    )

    result = pytester.runpytest(*LIGHT, "--gpu-leak-check")

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["VRAM leak: 4 MiB *"])


def test_a_rule_strikes_and_is_counted_where_torch_comes(
    pytester: pytest.Pytester,
) -> None:
    """In the call that imports it."""
    pytester.makepyfile(
        """
        import pytest

        def test_it():
            from late import take, torch
            with pytest.raises(torch.OutOfMemoryError):
                take()
        """
    )

    result = pytester.runpytest(*LIGHT, "--gpu-inject-oom=any:nth=1")

    result.assert_outcomes(passed=1)
    assert "was never reached" not in result.stdout.str()


@pytest.mark.parametrize("way", ["late", "-x", "id", "--lf", "reruns"])
def test_the_first_test_of_any_run_is_held(pytester: pytest.Pytester, way: str) -> None:
    """A plugin that comes late, runs of a part, and each attempt of a rerun."""
    pytester.makepyfile(
        test_it=PLACES["body"] + "\n        def test_other(): test_it()\n"
    )
    options = {"-x": ["-x"], "id": ["test_it.py::test_other"], "--lf": ["--lf"]}
    given = options.get(way, [])
    cache = [] if way == "--lf" else LIGHT
    checks = [] if way == "late" else list(CHECKS)
    if way == "late":
        pytester.makeconftest("pytest_plugins = ['pytest_gpumem.plugin']")
        pytester.makeini("[pytest]\ngpu_max_vram = 1MiB\ngpu_leak_check = true\n")
        given = ["-p", "no:gpumem"]
        pytester._monkeypatch.delenv("PYTEST_ADDOPTS")
    if way == "reruns":
        given = ["--reruns=1"]
    if way == "--lf":
        pytester.runpytest("-x")

    result = pytester.runpytest(*cache, *checks, *given)

    failed = {"-x": 1, "id": 1}.get(way, 2)
    assert failed == result.parseoutcomes()["failed"]
    result.stdout.fnmatch_lines([OVER] * failed)
    if way == "reruns":
        assert 2 == result.parseoutcomes()["rerun"]


@pytest.mark.slow
def test_a_run_whose_processes_alone_use_a_card_is_held(
    pytester: pytest.Pytester,
) -> None:
    """The real torch, first in a process that a test starts, then in a test."""
    pytester.makepyfile(
        test_it="""
        import subprocess
        import sys

        CODE = "import torch; torch.zeros(2**20, device='cuda')"

        def test_process():
            subprocess.run([sys.executable, "-c", CODE], check=True)

        def test_body():
            exec(CODE)
        """
    )

    result = pytester.runpytest_subprocess(*LIGHT, *CHECKS)

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines([OVER, "*in the test's children*", OVER])


def test_a_test_that_hides_the_card_before_torch_comes(
    pytester: pytest.Pytester,
) -> None:
    """A test of the CPU's path that imports torch last sees no card, and passes."""
    pytester.makepyfile(
        """
        def test_cpu(monkeypatch):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
            import late
            assert not late.torch.cuda.is_available()
        """
    )

    result = pytester.runpytest(*LIGHT, *CHECKS)

    result.assert_outcomes(passed=1)
