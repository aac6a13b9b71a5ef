"""Limits on peaks and leaks, as a run of pytest shows them, with workers and without."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported
from ways import WAYS, each_way

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["pytester"]


@pytest.fixture(params=["junit", pytest.param("both", marks=pytest.mark.slow)])
def run(
    request: pytest.FixtureRequest, pytester: pytest.Pytester
) -> Callable[..., pytest.RunResult]:
    """Run the tests of a text in one of the ways."""
    way = WAYS[request.param]

    def run(code: str, *options: str, ini: str = "") -> pytest.RunResult:
        pytester.makepyfile(code)
        if ini:
            pytester.makeini(f"[pytest]\n{ini}\n")
        result = pytester.runpytest("-p", "no:cacheprovider", *way, *options)
        if "junit" in str(way):
            cases = ET.parse(pytester.path / "junit.xml").iter("testcase")  # noqa: S314  # our own file
            assert [case for case in cases if case.find("properties") is not None]
        return result

    return run


def test_limits_of_each_metric_phase_and_card(
    run: Callable[..., pytest.RunResult],
) -> None:
    """Several on one test, on a class and a module; the nearest of a kind counts."""
    result = run(
        """
        import pytest
        import torch

        pytestmark = pytest.mark.max_vram("1MiB")

        @pytest.fixture
        def made():
            yield torch.zeros(2**21, device="cuda").numel()

        def take(mib, card=0):
            torch.zeros(mib * 2**18, device=f"cuda:{card}")

        def test_module():
            take(2)

        @pytest.mark.max_vram("4MiB")
        def test_nearer():
            take(2)

        @pytest.mark.max_vram("4MiB")
        @pytest.mark.max_vram("10MiB", metric="reserved")
        def test_reserved():
            take(2)

        @pytest.mark.max_vram("4MiB")
        class TestClass:
            def test_on_the_second_card(self):
                take(8, card=1)

            @pytest.mark.max_vram("9MiB", device=1)
            @pytest.mark.max_vram("9MiB", device=0)
            @pytest.mark.max_vram("9MiB")
            def test_cards_of_their_own(self):
                take(8, card=1)

        @pytest.mark.max_vram("4MiB", phase="test")
        def test_setup_counts(made):
            pass

        @pytest.mark.max_vram("4MiB")
        def test_setup_does_not_count(made):
            pass
        """,
        "--gpu-card=T4*2",
    )

    result.assert_outcomes(passed=3, failed=3, errors=1)
    result.stdout.fnmatch_lines_random(
        [
            "*peak VRAM above max_vram: allocated 2 MiB (2097152 bytes) on cuda:0, *",
            "*peak VRAM above max_vram: reserved 20 MiB (20971520 bytes) on cuda:0, *",
            "*peak VRAM above max_vram: allocated 8 MiB (8388608 bytes) on cuda:1, *",
            "OVER VRAM LIMIT *::test_module - *",
            "OVER VRAM LIMIT *::test_setup_counts*",
        ]
    )


@pytest.mark.parametrize("run", each_way(), indirect=True)
def test_a_broken_limit_has_a_letter_of_its_own(
    run: Callable[..., pytest.RunResult],
) -> None:
    """Among the failures; a word with -v."""
    result = run(
        """
        import pytest
        import torch

        @pytest.mark.max_vram("1MiB")
        def test_it():
            torch.zeros(2**20, device="cuda")
        """,
        "-v",
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*OVER VRAM LIMIT*"])


def test_the_ini_file_limits_tests_without_a_limit(
    run: Callable[..., pytest.RunResult],
) -> None:
    """A marker for allocated bytes replaces it; one for another metric does not."""
    result = run(
        """
        import unittest
        import pytest
        import torch

        def take():
            torch.zeros(2**20, device="cuda")

        def test_general():
            take()

        @pytest.mark.max_vram("8MiB")
        def test_own():
            take()

        @pytest.mark.max_vram("80MiB", metric="reserved")
        def test_other_metric():
            take()

        class TestUnit(unittest.TestCase):
            def test_unit(self):
                take()

        @pytest.mark.parametrize("number", [1, 2])
        def test_many(number):
            take()

        def test_without_a_card():
            pass
        """,
        ini="gpu_max_vram = 2MiB",
    )

    result.assert_outcomes(passed=2, failed=1 + 1 + 1 + 2)


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="subtests came with pytest 9")
def test_what_a_subtest_takes_is_its_tests(pytester: pytest.Pytester) -> None:
    """The limit is the whole test's."""
    pytester.makepyfile(
        """
        import torch

        def test_it(subtests):
            with subtests.test("inner"):
                torch.zeros(2**20, device="cuda")
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider", "--gpu-max-vram=2MiB")

    result.stdout.fnmatch_lines(["peak VRAM above max_vram: allocated 4 MiB *"])
    assert pytest.ExitCode.TESTS_FAILED == result.ret


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('"1MiB", metric="peak"', "metric='peak'; accepted are allocated, reserved"),
        ('"1MiB", phase="setup"', "phase='setup'; accepted are call, test"),
        ('"1MiB", device="cuda:0"', "device='cuda:0' is not a card's index"),
        ('"1 horse"', "1 horse"),
    ],
)
def test_a_limit_that_makes_no_sense_ends_the_run(
    pytester: pytest.Pytester, arguments: str, words: str
) -> None:
    """Before any test, with exit code 4."""
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.max_vram({arguments})
        def test_it():
            raise AssertionError("ran")
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"*::test_it: @pytest.mark.max_vram: *{words}*"])


LEAKS = """
    import pytest
    import torch

    KEPT = []

    @pytest.fixture(scope="module")
    def model():
        return torch.zeros(2**19, device="cuda")

    @pytest.fixture(scope="module")
    def larger(model):
        return torch.cat([model, model])

    def test_clean(model):
        assert (model + 1).is_cuda

    def test_leak(larger):
        KEPT.append(torch.zeros(2**18, device="cuda"))

    @pytest.mark.max_vram_leak("2MiB")
    def test_allowed():
        KEPT.append(torch.zeros(2**18, device="cuda"))

    def test_failing():
        held = torch.zeros(2**18, device="cuda")
        raise AssertionError

    def test_after():
        torch.zeros(2**18, device="cuda")
"""


def test_a_leak_fails_the_test_and_names_its_holder(
    run: Callable[..., pytest.RunResult],
) -> None:
    """Fixtures of wider scope are not the test's; a failed test is failed already."""
    result = run(LEAKS, "--gpu-leak-check")

    result.assert_outcomes(passed=4, failed=1, errors=1)
    result.stdout.fnmatch_lines_random(
        [
            "VRAM leak: 1 MiB (1048576 bytes) stay on the card after the test; *",
            "  1 MiB (262144 float32): *global 'KEPT' of *",
        ]
    )


def test_without_the_check_only_the_marker_counts(pytester: pytest.Pytester) -> None:
    """And a size that is none ends the run."""
    pytester.makepyfile(LEAKS.replace('max_vram_leak("2MiB")', "max_vram_leak"))
    result = pytester.runpytest("-p", "no:cacheprovider")
    result.assert_outcomes(passed=4, failed=1, errors=1)

    pytester.makepyfile(LEAKS.replace('"2MiB"', '"a lot"'))
    wrong = pytester.runpytest("-p", "no:cacheprovider")
    assert pytest.ExitCode.USAGE_ERROR == wrong.ret
    wrong.stderr.fnmatch_lines(["*@pytest.mark.max_vram_leak: *a lot*"])


def test_the_process_metric_counts_the_context(pytester: pytest.Pytester) -> None:
    """What the driver holds for the process beside the allocator's bytes."""
    pytester.makepyfile(
        """
        import pytest
        import torch

        @pytest.mark.max_vram("100MiB", metric="process")
        def test_it():
            torch.zeros(1, device="cuda")
        """
    )
    small = pytester.runpytest("-p", "no:cacheprovider", "--gpu-card=8GiB,ctx=50MiB")
    large = pytester.runpytest("-p", "no:cacheprovider", "--gpu-card=8GiB,ctx=99MiB")

    small.assert_outcomes(passed=1)
    large.assert_outcomes(failed=1)
    large.stdout.fnmatch_lines(["*above max_vram: process 101 MiB (*"])


FRAGMENTING = """
import pytest
import torch

MIB = 2**20


def holes():
    # Thirteen blocks in one segment of 20 MiB; what is freed of it is of no use to 18.
    kept = [torch.empty(3 * MIB // 2, device="cuda", dtype=torch.uint8) for _ in range(13)]
    del kept[::2]
    kept.append(torch.empty(18 * MIB, device="cuda", dtype=torch.uint8))
    return kept


@pytest.mark.max_vram(LIMIT, metric="fragmented")
def test_it():
    kept = holes()
    del kept
    # Most of the card's memory is now cached, which is no fragment.
    torch.empty(MIB, device="cuda", dtype=torch.uint8)
"""
#: Two segments of 20 and 18 MiB, with six blocks of 1.5 MiB and one of 18 in them.
FRAGMENTS = (20 + 18) * 2**20 - (6 * 3 * 2**20 // 2 + 18 * 2**20)


@pytest.mark.parametrize("spare", [0, -1])
def test_a_limit_on_fragments_counts_what_is_unused_at_the_peak(
    pytester: pytest.Pytester, spare: int
) -> None:
    """At the limit it holds, one byte below it does not; the peak's line is named."""
    code = FRAGMENTING.replace("LIMIT", str(FRAGMENTS + spare))
    pytester.makepyfile(code)

    result = pytester.runpytest("-v", "--gpu-card=T4")

    result.assert_outcomes(passed=1 + spare, failed=-spare)
    lines = [
        "*above max_vram: fragmented 11 MiB *",
        "most was allocated at *.py:11 in holes*",
    ]
    result.stdout.fnmatch_lines(lines if spare else [])
    result.stdout.fnmatch_lines(["peak allocated *retries  fragmented  test"])


TRAINING = """
import pytest
import torch


@pytest.mark.max_vram(LIMIT, metric="activations")
def test_it():
    layer = torch.nn.Linear(256, 1024, bias=False, device="cuda")
    kept = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.ReLU())
    values = torch.ones(512, 256, device="cuda")
    kept(values)
"""
#: What the linear layer gives, and what each ReLU gives: the first is freed by then.
ACTIVATIONS = 2 * 512 * 1024 * 4


@pytest.mark.parametrize("spare", [0, -1])
def test_a_limit_on_activations_counts_what_modules_compute(
    pytester: pytest.Pytester, spare: int
) -> None:
    """Weights and inputs do not count; the text has the peak by kind."""
    pytester.makepyfile(TRAINING.replace("LIMIT", str(ACTIVATIONS + spare)))

    result = pytester.runpytest()

    result.assert_outcomes(passed=1 + spare, failed=-spare)
    lines = [
        "*above max_vram: activations 4 MiB *",
        "of * on cuda:0: * activations 4 MiB, weights 1 MiB, unnamed 512 KiB",
    ]
    result.stdout.fnmatch_lines(lines if spare else [])


def test_activations_of_child_processes_are_no_limit(
    pytester: pytest.Pytester,
) -> None:
    """They are not recorded there; the run says so before any test."""
    code = TRAINING.replace('"activations"', '"activations", phase="children"')
    pytester.makepyfile(code.replace("LIMIT", "7"))

    result = pytester.runpytest()

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*'activations' is not known of child processes; *"])


REPEATED = """
import pytest
import torch

KEPT, RUNS, CACHE = [], [], {}


@pytest.fixture
def made():
    RUNS.append("fixture")
    return 7


@pytest.mark.max_vram_leak(repeat=3, warmup=1)
def test_cached(made):
    RUNS.append("cached")
    CACHE.setdefault("once", torch.ones(made, device="cuda"))


@pytest.mark.max_vram_leak(repeat=3)
def test_growing(made):
    KEPT.append(torch.ones(made, device="cuda"))


@pytest.mark.max_vram_leak("512B", repeat=3)
def test_growing_as_allowed(made):
    KEPT.append(torch.ones(made, device="cuda"))


@pytest.mark.max_vram_leak(repeat=3)
def test_wrong(made):
    assert not torch.ones(made, device="cuda").any()


@pytest.mark.oom_sweep(recover=True)
@pytest.mark.max_vram_leak(repeat=3)
def test_swept_and_growing():
    KEPT.append(torch.ones(7, device="cuda"))


@pytest.mark.oom_sweep
@pytest.mark.max_vram_leak(repeat=3)
def test_swept_and_right(made):
    RUNS.append("swept")
    torch.ones(made, device="cuda")


def test_runs():
    # Four repeats, the run that finds the sweep's points, and a run for each point.
    assert RUNS.count("swept") > 5
    assert RUNS.count("cached") == 4
    assert RUNS.count("fixture") == 5


@pytest.mark.max_vram_leak(repeat=3)
async def test_async():
    pass
"""


def test_a_repeated_test_may_not_grow(pytester: pytest.Pytester) -> None:
    """Each run is judged beside the others; one that cannot be repeated says so."""
    pytester.makepyfile(REPEATED)

    result = pytester.runpytest("--gpu-leak-check", "-rA")

    result.assert_outcomes(passed=4, failed=3, errors=1)
    result.stdout.fnmatch_lines(
        [
            "VRAM leak: memory grows by 512 B (512 bytes) in each step after the first 1*",
            "  512 B (7 float32): a list of *, global 'KEPT' of *",
        ]
    )
    result.stdout.fnmatch_lines(["*max_vram_leak(repeat=...) needs a plain test *"])


@pytest.mark.parametrize("given", ["repeat=2", "repeat='often'", "repeat=3, warmup=-1"])
def test_a_number_of_runs_is_checked_early(
    pytester: pytest.Pytester, given: str
) -> None:
    """Before any test."""
    pytester.makepyfile(REPEATED.replace("repeat=3, warmup=1", given))

    result = pytester.runpytest()

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*max_vram_leak: *; give a number of runs from *"])
