"""Budgets belong to owners, who take them back in any order; the smallest one holds."""

from __future__ import annotations

import textwrap
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from pytest_gpumem import simulated_device, vram_budget
from pytest_gpumem.cards import find_card
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.devices.budgets import Budgets
from pytest_gpumem.devices.fractions import fraction_for
from pytest_gpumem.errors import BudgetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

MIB: Final = 2**20
TOTAL: Final = 256 * MIB
CARD: Final = "--gpu-card=256MiB,cc=8.0"
LIGHT: Final = ("-p", "no:cacheprovider", CARD)
SIZES = st.integers(1, TOTAL) | st.just(TOTAL)


# -- the core -----------------------------------------------------------------------------


class BudgetMachine(RuleBasedStateMachine):
    """Blocks, run, tests and user code in any order, beside a model of ten lines."""

    blocks: Bundle[int] = Bundle("blocks")

    @initialize()
    def install(self) -> None:
        self.stack = ExitStack()
        self.stack.enter_context(simulated_device(find_card("256MiB,cc=8.0")))
        self.device = active_device()
        self.open: dict[int, AbstractContextManager[int]] = {}
        self.model: dict[object, int] = {}
        self.fraction = 1.0
        self.count = 0

    @rule(target=blocks, size=SIZES)
    def push(self, size: int) -> int:
        self.count += 1
        name = self.count
        self.open[name] = vram_budget(size)
        self.model[name] = size
        assert min(self.model.values()) == self.open[name].__enter__()
        return name

    @rule(name=consumes(blocks), fails=st.booleans())
    def pop(self, name: int, *, fails: bool) -> None:
        block = self.open.pop(name)
        del self.model[name]
        if fails:
            assert not block.__exit__(KeyError, KeyError(), None)
        else:
            block.__exit__(None, None, None)

    @rule(owner=st.sampled_from(["run", "trial", None]), size=SIZES | st.none())
    def put(self, owner: str | None, size: int | None) -> None:
        self.device.set_budget(0, size, owner=owner)
        self.model.pop(owner, None)
        if size is not None:
            self.model[owner] = size

    @rule(size=st.sampled_from([0, -1, TOTAL + 1]))
    def refuse(self, size: int) -> None:
        with pytest.raises(BudgetError):
            self.device.set_budget(0, size, owner="run")

    @rule(fraction=st.floats(0, 1))
    def user_code_sets_a_fraction(self, fraction: float) -> None:
        torch.cuda.set_per_process_memory_fraction(fraction)
        self.fraction = fraction

    @invariant()
    def the_smallest_holds(self) -> None:
        if not hasattr(self, "device"):
            return
        smallest = min(self.model.values(), default=TOTAL)
        limit = min(smallest, int(self.fraction * TOTAL))
        allocator = self.device.machine.cards[0].allocator  # type: ignore[attr-defined]  # simulated
        assert (smallest if self.model else None) == self.device.budget(0)
        assert smallest == torch.cuda.mem_get_info()[0]
        assert (limit if limit < TOTAL else None) == allocator.limit_bytes
        assert self.fraction == torch.cuda.get_per_process_memory_fraction()

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()


BudgetMachine.TestCase.settings = settings(stateful_step_count=20, max_examples=25)
TestBudgetMachine = BudgetMachine.TestCase


@pytest.fixture
def _card() -> Iterator[None]:
    """A simulated card of 256 MiB."""
    with simulated_device(find_card("256MiB,cc=8.0")):
        yield


@pytest.mark.usefixtures("_card")
def test_the_bounds_of_a_budget_are_inclusive() -> None:
    """One byte and the whole card are budgets; a byte less or more is none."""
    budgets = Budgets()

    for nbytes in (1, 100):
        budgets.put("owner", nbytes, total_bytes=100, index=0, name="T4")
        assert nbytes == budgets.smallest
    for nbytes in (-1, 0, 101):
        with pytest.raises(BudgetError, match="accepted are 1 to 100 bytes"):
            budgets.put("owner", nbytes, total_bytes=100, index=0, name="T4")


@pytest.mark.usefixtures("_card")
def test_crossed_blocks_each_take_their_own_back() -> None:
    """The first to end is not the last to have begun."""
    first, second = vram_budget("64MiB"), vram_budget("128MiB")
    first.__enter__()
    second.__enter__()

    first.__exit__(None, None, None)
    between = active_device().budget(0)
    second.__exit__(None, None, None)

    assert 128 * MIB == between
    assert active_device().budget(0) is None


@pytest.mark.usefixtures("_card")
def test_blocks_of_threads_cross() -> None:
    """One thread's block ends inside another's; the card is whole again at the end."""
    entered, left = threading.Event(), threading.Event()

    def body() -> None:
        with vram_budget("32MiB"):
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=body)
    with vram_budget("64MiB"):
        thread.start()
        entered.wait(60)
        both = active_device().budget(0)
    one = active_device().budget(0)
    left.set()
    thread.join()

    assert (32 * MIB, 32 * MIB) == (both, one)
    assert active_device().budget(0) is None


@pytest.mark.parametrize("total", [2**20, 15_642_329_088, 85_017_493_504, 2**50 - 1])
def test_a_fraction_means_the_bytes_of_its_budget(total: int) -> None:
    """To the byte: torch truncates what it multiplies."""
    for limit in (1, 2, total // 3, total // 2 + 1, total - 1, total):
        assert limit == int(fraction_for(limit, total) * total)


# -- in a run ---------------------------------------------------------------------------

HEAD: Final = """
import pytest
import torch
from pytest_gpumem import vram_budget
from pytest_gpumem.devices.active import active_device

def mib():
    budget = active_device().budget(0)
    return None if budget is None else budget // 2**20
"""
#: Tests that pass in a run, each by itself or one after the other.
RUNS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "fixtures of wider scope": (
        """
        @pytest.fixture(scope="session", autouse=True)
        def whole():
            with vram_budget("200MiB"):
                yield

        @pytest.fixture(scope="module")
        def module():
            with vram_budget("64MiB"):
                yield

        @pytest.fixture
        def own():
            with vram_budget("32MiB"):
                yield

        class TestOne:
            @pytest.fixture(scope="class", autouse=True)
            def of_class(self):
                with vram_budget("100MiB"):
                    yield

            def test_class(self):
                assert mib() == 100

            def test_module(self, module):
                assert mib() == 64

            def test_function(self, module, own):
                assert mib() == 32

            def test_module_again(self, module):
                assert mib() == 64
                assert torch.cuda.mem_get_info()[0] == 64 * 2**20

        @pytest.mark.gpu_budget("16MiB")
        def test_marker():
            assert mib() == 16

        @pytest.mark.gpu_budget("128MiB")
        def test_marker_beside_a_fixture(module):
            assert mib() == 64

        def test_after_the_marker():
            assert mib() == 64
        """,
        (),
    ),
    "the run's": (
        """
        @pytest.mark.gpu_budget("128MiB")
        def test_marker_in_its_place():
            assert mib() == 128

        def test_block():
            with vram_budget("128MiB") as budget:
                assert budget == 64 * 2**20
            assert mib() == 64

        @pytest.mark.gpu_budget("128MiB")
        def test_block_and_marker():
            with vram_budget("100MiB"):
                assert mib() == 100
            assert mib() == 128
        """,
        ("--gpu-budget=64MiB",),
    ),
    "a fraction of user code": (
        """
        def test_sets_a_fraction():
            with vram_budget("64MiB"):
                torch.cuda.set_per_process_memory_fraction(0.125)
                with pytest.raises(torch.OutOfMemoryError, match="32.00 MiB allowed"):
                    torch.zeros(40 * 2**18, device="cuda")
            with pytest.raises(torch.OutOfMemoryError, match="32.00 MiB allowed"):
                torch.zeros(40 * 2**18, device="cuda")
            torch.cuda.set_per_process_memory_fraction(1.0)

        def test_that_of_a_budget_is_not_its():
            with vram_budget("64MiB"):
                torch.cuda.set_per_process_memory_fraction(1.0)
                with pytest.raises(torch.OutOfMemoryError, match="64.00 MiB allowed"):
                    torch.zeros(100 * 2**18, device="cuda")
        """,
        (),
    ),
    "subtests": (
        """
        import unittest

        def test_it(subtests):
            for count in (32, 64):
                with subtests.test(str(count)), vram_budget(f"{count}MiB"):
                    assert mib() == count
            assert mib() is None

        class TestIt(unittest.TestCase):
            @classmethod
            def setUpClass(cls):
                budget = vram_budget("64MiB")
                budget.__enter__()
                cls.addClassCleanup(budget.__exit__, None, None, None)

            def test_one(self):
                with self.subTest("inner"), vram_budget("32MiB"):
                    assert mib() == 32

            def test_two(self):
                assert mib() == 64

        def test_after():
            assert mib() is None
        """,
        (),
    ),
    "reruns": (
        """
        attempts = []

        @pytest.fixture(scope="module")
        def module():
            with vram_budget("64MiB"):
                yield

        def test_flaky(module, vram_budget):
            assert mib() == 64
            block = vram_budget("32MiB")
            with block:
                attempts.append(1)
                assert len(attempts) == 2

        def test_after(module):
            assert mib() == 64
        """,
        ("--reruns=1",),
    ),
    "children": (
        """
        import os
        import subprocess
        import sys

        from pytest_gpumem.inheritance import CHILDREN_VARIABLE, Inheritance

        CODE = "import torch; print(torch.cuda.mem_get_info()[0] // 2**20)"

        def told():
            return Inheritance.parse(os.environ[CHILDREN_VARIABLE]).budgets

        @pytest.fixture(scope="module")
        def module():
            with vram_budget("64MiB"):
                yield

        @pytest.mark.inject_oom("any:nth=99,times=1")
        def test_first(module):
            with pytest.raises(torch.OutOfMemoryError):
                for _ in range(99):
                    torch.zeros(1, device="cuda")
            assert told() == {"0": str(64 * 2**20)}

        @pytest.mark.gpu_budget("128MiB")
        def test_second(module):
            assert told() == {"0": str(64 * 2**20)}
            command = [sys.executable, "-c", CODE]
            assert int(subprocess.check_output(command, text=True)) == 64
        """,
        (),
    ),
    "xdist": (
        """
        @pytest.fixture(scope="module")
        def module():
            with vram_budget("64MiB"):
                yield

        @pytest.mark.parametrize("n", range(4))
        def test_it(module, n):
            assert mib() == 64
        """,
        ("-n", "2"),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if "-n" in options else name
        for name, (_text, options) in RUNS.items()
        if name != "subtests" or pytest.version_tuple >= (9,)  # it is new there
    ],
)
def test_budgets_of_a_run(pytester: pytest.Pytester, name: str) -> None:
    """Every test sees the smallest of what is alive, and nothing of what is gone."""
    text, options = RUNS[name]
    pytester.makepyfile(test_it=HEAD + "\n" + textwrap.dedent(text))

    result = pytester.runpytest(*LIGHT, *options)

    outcomes: dict[str, Any] = result.parseoutcomes()
    assert "passed" in outcomes, result.stdout.str()
    assert not {"failed", "error", "errors"} & set(outcomes)
