"""Limits that a suite lacks: how much, printed, and found by bisection."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported
from hypothesis import given
from hypothesis import strategies as st
from ways import WAYS, each_way

from pytest_gpumem.cards import CARDS
from pytest_gpumem.plugin import smallest  # an inner run keeps it
from pytest_gpumem.records.memory_figures import MemoryFigures
from pytest_gpumem.records.record import PhaseFigures, Record
from pytest_gpumem.reports.suggestions import (
    size_text,
    suggested_limit,
    suggestion_lines,
    too_generous,
)
from pytest_gpumem.sizes import parse_size

pytest_plugins = ["pytester"]

MIB = 2**20
LIGHT = ("-p", "no:cacheprovider")


@given(st.integers(1, 2**44))
def test_a_suggestion_has_head_room_and_is_no_more_generous(peak: int) -> None:
    """It is above the peak, reads back exactly, and is not itself flagged."""
    limit = suggested_limit(peak)

    assert int(peak * 1.1) <= limit < max(peak * 1.1 * 1.07, MIB + 1) + MIB
    assert limit == parse_size(size_text(limit))
    assert [] == too_generous([a_test("t", peak, peak, max_vram_bytes=limit)])


def a_test(name: str, allocated: int, reserved: int, **facts: Any) -> Record:
    """A test with these peaks of its call."""
    figures = MemoryFigures(0, allocated, reserved, 0, 0, 0, 0, 0, 0, 0)
    call = [PhaseFigures.of("call", figures)]
    return Record(name, "passed", 0.5, "T4", call, **facts)


def test_what_is_said_of_a_suite() -> None:
    """Missing, generous, smallest budgets, cards; parameters share a marker."""
    tests = [
        a_test("a.py::test_many[1]", MIB, 2 * MIB),
        a_test("a.py::test_many[2]", 8 * MIB, 20 * MIB),
        a_test("a.py::test_near", MIB, MIB, max_vram_bytes=2 * MIB),
        a_test("a.py::test_far", 8 * MIB, MIB, max_vram_bytes=80 * MIB),
        a_test("a.py::test_none", 0, 0, smallest_budget_bytes=4 * MIB),
    ]
    lines = suggestion_lines(tests)
    num_cards = sum(not each.is_integrated for each in CARDS.values())

    assert [
        'a.py::test_many: @pytest.mark.max_vram("9MiB")  # peak 8 MiB',
        "a.py::test_far: its limit of 80 MiB is 10.0 times its peak of 8 MiB; 9MiB "
        "would do",
        "a.py::test_none: passes from a budget of 4 MiB on",
        "the suite needs 20 MiB beside the context (a.py::test_many[2]); it fits on "
        f"{num_cards} of the {num_cards} cards that are known, of which RTX-3070 is "
        "the smallest",
    ] == lines


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (2**44, "none of the"),
        (CARDS["L4"].total_bytes - 226 * MIB, "of which L4 is the smallest"),
        (CARDS["L4"].total_bytes - 225 * MIB, "of which A10 is the smallest"),
    ],
)
def test_the_smallest_card_that_has_the_room_is_named(nbytes: int, words: str) -> None:
    """What its context takes is not there for PyTorch."""
    assert words in suggestion_lines([a_test("t", 0, nbytes)])[-1]


TESTS = """
    import torch
    import pytest as pt

    def take(mib):
        torch.zeros(mib * 2**18, device="cuda")

    @pt.mark.parametrize("mib", [2, 8])
    def test_many(mib):
        take(mib)

    @pt.mark.max_vram("80MiB")
    def test_generous():
        take(8)

    @pt.mark.max_vram("9MiB")
    def test_good():
        take(8)

    def test_fails():
        take(8)
        raise ValueError

    def test_no_card():
        pass
"""


@pytest.mark.parametrize("way", each_way())
def test_limits_are_suggested(way: str, pytester: pytest.Pytester) -> None:
    """For tests that pass and lack one, and where one is generous."""
    pytester.makepyfile(test_it=TESTS)
    result = pytester.runpytest(*LIGHT, *WAYS[way], "--gpu-suggest")

    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines_random(
        [
            'test_it.py::test_many: @pytest.mark.max_vram("9MiB")  # peak 8 MiB',
            "test_it.py::test_generous: its limit of 80 MiB is 10.0 times its *",
            "the suite needs 20 MiB beside the context (test_it.py::*); it fits on *",
        ]
    )
    for name in ("good", "fails", "no_card"):
        result.stdout.no_fnmatch_line(f"*test_{name}: @pytest*")


def test_a_patch_is_no_longer_written(pytester: pytest.Pytester) -> None:
    """The option is accepted, says so once, and suggests as without it."""
    pytester.makepyfile(test_it=TESTS)
    result = pytester.runpytest(*LIGHT, "--gpu-suggest=it.patch")

    result.assert_outcomes(passed=5, failed=1, warnings=1)
    result.stdout.fnmatch_lines_random(
        ["*--gpu-suggest=it.patch: patches are no longer written; *", "*test_many: @*"]
    )
    assert not (pytester.path / "it.patch").exists()


def test_a_test_file_is_never_overwritten(pytester: pytest.Pytester) -> None:
    """A test file that follows the option is run, and not the option's value."""
    test_file = pytester.makepyfile(test_it="def test_it(): pass")
    before = test_file.read_bytes()
    result = pytester.runpytest(*LIGHT, "--gpu-suggest", "test_it.py")

    result.assert_outcomes(passed=1)
    assert before == test_file.read_bytes()


def test_trials_that_fail_call_no_debugger(pytester: pytest.Pytester) -> None:
    """The two options together end the run before any test."""
    pytester.makepyfile("def test_it(): raise AssertionError('ran')")
    result = pytester.runpytest(*LIGHT, "--gpu-suggest=budgets", "--pdb")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*makes tests fail on purpose; run it without --pdb*"])


#: What pytest 9 brings itself.
SUBTESTS = """
    import contextlib
    import types

    import pytest

    @pytest.fixture
    def subtests():
        return types.SimpleNamespace(test=contextlib.nullcontext)
"""

SMALLEST = """
    import unittest

    import pytest
    import torch

    made = []

    @pytest.fixture(scope="module")
    def wide():
        made.append("wide")

    @pytest.fixture
    def narrow(wide):
        made.append("narrow")
        return torch.zeros(2**18, device="cuda")

    def test_plain(narrow):
        torch.zeros(3 * 2**20, device="cuda")

    def test_fallback():
        for mib in (40, 30, 20):
            try:
                torch.zeros(mib * 2**18, device="cuda")
                return
            except torch.OutOfMemoryError:
                print("smaller")
        raise RuntimeError

    def test_fails():
        torch.zeros(2**20, device="cuda")
        raise ValueError

    def test_no_card():
        pass

    @pytest.mark.oom_sweep(points=1)
    def test_sweep():
        torch.zeros(2**20, device="cuda")

    def test_subtests(subtests):
        with subtests.test("a"):
            torch.zeros(2**20, device="cuda")

    class TestOld(unittest.TestCase):
        def test_parts(self):
            for mib in (10, 12):
                with self.subTest(mib=mib):
                    torch.zeros(mib * 2**18, device="cuda")

        def test_whole(self):
            torch.zeros(16 * 2**18, device="cuda")

    def test_without_room_for_half():
        if made.append("again") or made.count("again") == 2:
            raise RuntimeError
        torch.zeros(2**20, device="cuda")

    def test_fixtures(wide):
        assert made.count("wide") == 1
        assert made.count("narrow") in (0, 6)
"""


@pytest.mark.parametrize("way", each_way())
def test_the_smallest_budget_is_found(way: str, pytester: pytest.Pytester) -> None:
    """Fixtures are made anew, trials are not reported, failures stay failures."""
    pytester.makepyfile(test_it=textwrap.dedent(SMALLEST))
    if pytest.version_tuple < (9,):
        pytester.makeconftest(SUBTESTS)
    result = pytester.runpytest(*LIGHT, *WAYS[way], "--gpu-suggest=budgets")

    counts = result.parseoutcomes()
    assert (9 if "-n" not in WAYS[way] else counts["passed"]) == counts["passed"]
    assert 1 == counts["failed"]
    swept = "test_sweep" if "-n" not in WAYS[way] else "test_sweep[[]points 1 of 2]"
    result.stdout.fnmatch_lines_random(
        [
            "test_it.py::test_fallback: passes from a budget of 20 MiB on",
            "test_it.py::test_plain: passes from a budget of 14 MiB on",
            "test_it.py::TestOld::test_parts: passes from a budget of 12 MiB on",
            "test_it.py::TestOld::test_whole: passes from a budget of 16 MiB on",
            f"test_it.py::{swept}: its smallest budget was not sought: it is swept, *",
            "test_it.py::test_subtests: its smallest budget was not sought: the fixture *",
            "test_it.py::test_without_room_for_half: its smallest budget was not found: "
            "the test does not behave the same each time",
        ]
    )
    for name in ("test_fails", "test_no_card", "test_sweep", "test_fixtures"):
        result.stdout.no_fnmatch_line(f"*{name}: passes from*")
    if "junit" in str(WAYS[way]):
        text = (pytester.path / "junit.xml").read_text(encoding="utf-8")
        assert f'name="gpumem.smallest_budget" value="{14 * MIB}"' in text


def test_a_trial_that_does_not_end_is_bounded(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts as failed, and is told of; also where it waits for a lock."""
    monkeypatch.setattr(smallest, "PATIENCE_S", 0.5)
    monkeypatch.setattr(smallest, "PATIENCE", 0)
    pytester.makepyfile(
        test_it="""
        import threading
        import torch

        def test_it():
            try:
                torch.zeros(10 * 2**18, device="cuda")
            except torch.OutOfMemoryError:
                threading.Event().wait()
        """
    )

    result = pytester.runpytest(*LIGHT, "--gpu-suggest=budgets")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "*= smallest budgets of GPU memory =*",
            "test_it.py::test_it: passes from a budget of 10 MiB on; 3 of the trials "
            "below did not end in 0.5 s",
        ]
    )
