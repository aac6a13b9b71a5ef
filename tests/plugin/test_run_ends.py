"""A run ends as it should, however it ends: all is put back, and nothing is held."""

from __future__ import annotations

import textwrap
from multiprocessing.reduction import ForkingPickler
from typing import Final

import pytest
import torch
from torch._dynamo import trace_rules
from torch.jit import _builtins

from pytest_gpumem import simulated_device
from pytest_gpumem.devices.nvml_hook import NvmlHook
from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.devices.simulated import compiling
from pytest_gpumem.devices.simulated.constructors import CONSTRUCTORS
from pytest_gpumem.devices.simulated.machine import innermost_machine
from pytest_gpumem.instruments.snapshots import history_kept
from pytest_gpumem.plugin.children import Children

LIGHT: Final = ("-p", "no:cacheprovider")
HEAD: Final = """
import pytest
import torch

def mib(count):
    return torch.zeros(count * 2**18, device="cuda")

def allocated():
    return torch.cuda.memory_allocated() // 2**20
"""

# -- starting and stopping --------------------------------------------------------------


def test_one_that_fails_to_stop_keeps_no_other(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch and the environment are put back although the first part raises."""

    def fails(_children: Children) -> None:
        raise OSError("the disk is gone")

    before = innermost_machine(), torch.cuda.mem_get_info, torch.zeros
    monkeypatch.setattr(Children, "stop", fails)
    pytester.makepyfile("import torch\ndef test_it(): torch.zeros(1, device='cuda')")

    result = pytester.runpytest(*LIGHT, "--gpu-card=8GiB,cc=8.0")

    assert "OSError: the disk is gone" in result.stdout.str() + result.stderr.str()
    assert before == (innermost_machine(), torch.cuda.mem_get_info, torch.zeros)


def test_patches_are_put_back_whichever_fails() -> None:
    """Attributes, entries of tables, and those that were not there."""

    class Owner:
        kept = 1

    table = {"kept": 1}
    patches = PatchSet()
    patches.set(Owner, "kept", 2)
    patches.set(Owner, "gone", 2)
    patches.set(Owner, "new", 2)
    patches.put(table, "kept", 2)
    patches.put(table, "new", 2)
    del Owner.gone  # type: ignore[attr-defined]  # so that it cannot be taken away

    with pytest.raises(AttributeError):
        patches.restore()

    assert (1, False, {"kept": 1}) == (Owner.kept, hasattr(Owner, "new"), table)


def test_a_block_that_cannot_begin_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the last part of it fails."""

    def fails(_hook: NvmlHook) -> None:
        raise OSError("no")

    before = innermost_machine(), torch.zeros
    monkeypatch.setattr(NvmlHook, "start", fails)

    with pytest.raises(OSError, match="no"), simulated_device("T4"):
        raise AssertionError("unreachable")

    assert before == (innermost_machine(), torch.zeros)


def test_tables_of_torch_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript's built-ins, TorchDynamo's rules, multiprocessing's reducers."""
    table = _builtins._get_builtin_table()
    reducers = ForkingPickler._extra_reducers  # type: ignore[attr-defined]  # not in the stubs
    # As if no machine were around this one.
    monkeypatch.setattr(compiling, "_hidden", [])
    monkeypatch.setattr(
        "pytest_gpumem.devices.simulated.install.innermost_machine", lambda: None
    )
    ours = [
        id(each) for each in CONSTRUCTORS.values()
    ]  # torch adds others as it compiles
    for key in ours:
        monkeypatch.delitem(table, key, raising=False)
    before = dict(reducers), list(trace_rules.SKIP_DIRS)

    with simulated_device("T4"):
        compiled = torch.compile(lambda x: x + 1, backend="eager")
        assert 2 == compiled(torch.ones(1)).item()
        assert before[1] != trace_rules.SKIP_DIRS
        assert set(ours) <= set(table)

    assert before == (dict(reducers), trace_rules.SKIP_DIRS)
    assert not set(ours) & set(table)


def test_a_history_is_kept_for_its_block_only() -> None:
    """One that user code keeps goes on, and its choice holds."""
    with simulated_device("T4") as machine:
        with history_kept():
            kept = machine.history
        assert kept
        assert machine.history is None

        torch.cuda.init()
        torch.cuda.memory._record_memory_history(max_entries=3)
        own = machine.history
        with history_kept():
            assert own is machine.history
        assert own is machine.history


# -- what failed phases hold ------------------------------------------------------------

FAILURES: Final = {
    # In its frame a failed test holds what a fixture gave it.
    "module fixture": """
        @pytest.fixture(scope="module")
        def model():
            return [mib(64)]

        def test_fails(model):
            inner = model[0]
            assert False
    """,
    "setup of a wider fixture": """
        @pytest.fixture(scope="module")
        def model():
            held = mib(64)
            mib(10**6)

        def test_fails(model): pass
    """,
    "setup": """
        @pytest.fixture
        def model():
            held = mib(64)
            raise ValueError

        def test_fails(model): pass
    """,
    "teardown": """
        @pytest.fixture
        def model():
            yield
            held = mib(64)
            raise ValueError

        def test_fails(model): pass
    """,
    "chained": """
        def test_fails():
            try:
                held = mib(64)
                mib(10**6)
            except torch.OutOfMemoryError as error:
                raise ValueError from error
    """,
    "expected": """
        @pytest.mark.xfail(strict=True)
        def test_fails():
            held = mib(64)
            assert False
    """,
    "skip": """
        def test_fails():
            held = mib(64)
            pytest.skip("late")
    """,
    "subtest": """
        def test_fails(subtests):
            with subtests.test("part"):
                held = mib(64)
                assert False
    """,
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_phase_holds_nothing(pytester: pytest.Pytester, name: str) -> None:
    """The next module finds the card empty, and is blamed for no leak.

    Another plugin keeps every exception, as those that run tests again do.
    """
    pytester.makeconftest(
        """
        import pytest
        kept = []

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item, call):
            kept.append(call)
            return (yield)
        """
    )
    second = "def test_next():\n    assert allocated() == 0\n    mib(1)\n"
    first = textwrap.dedent(FAILURES[name])
    pytester.makepyfile(test_a=f"{HEAD}\n{first}", test_b=f"{HEAD}\n{second}")

    result = pytester.runpytest(*LIGHT, "--gpu-leak-check", "--gpu-card=8GiB,cc=8.0")

    assert "VRAM leak" not in result.stdout.str()
    result.stdout.fnmatch_lines(["test_b.py .*"])


@pytest.mark.parametrize(
    "module",
    [
        """
        @pytest.fixture(scope="module")
        def model():
            held = mib(64)
            mib(10**6)
            yield

        def test_first(model): pass
        """,
        """
        @pytest.fixture(scope="module")
        def model():
            return [mib(64)]

        def test_first(model):
            model.clear()
        """,
    ],
    ids=["failed", "smaller by now"],
)
def test_the_last_test_of_a_module_is_not_blamed_for_its_fixture(
    pytester: pytest.Pytester, module: str
) -> None:
    """A fixture that is gone held no more than it did: one that failed, nothing."""
    last = "def test_last():\n    assert allocated() == 0\n    mib(1)\n"
    pytester.makepyfile(f"{HEAD}\n{textwrap.dedent(module)}\n{last}")

    result = pytester.runpytest(*LIGHT, "--gpu-leak-check", "--gpu-card=8GiB,cc=8.0")

    assert "VRAM leak" not in result.stdout.str()
    assert 1 <= result.parseoutcomes()["passed"]


def test_a_debugger_sees_what_failed(pytester: pytest.Pytester) -> None:
    """Variables of a failed test are there while it is reported."""
    pytester.makeconftest(
        """
        def pytest_exception_interact(call):
            tensor = call.excinfo.traceback[-1].frame.f_locals["held"]
            print("seen", tensor.numel())
        """
    )
    pytester.makepyfile(f"{HEAD}\ndef test_it():\n    held = mib(1)\n    assert False")

    result = pytester.runpytest(*LIGHT, "--showlocals", "-s")

    result.stdout.fnmatch_lines(["*seen 262144", "held *= tensor(*"])


# -- beside other plugins ---------------------------------------------------------------


@pytest.mark.slow
def test_reruns_of_the_ini_file_hold_among_workers(pytester: pytest.Pytester) -> None:
    """As those of the option do."""
    pytester.makeini("[pytest]\nreruns = 1\n")
    pytester.makepyfile(
        f"""{HEAD}
attempts = []

def test_flaky():
    mib(1)
    attempts.append(1)
    assert len(attempts) == 2
"""
    )

    result = pytester.runpytest(*LIGHT, "-n", "1")

    assert {"passed": 1, "rerun": 1} == {
        name: result.parseoutcomes().get(name) for name in ("passed", "rerun")
    }
