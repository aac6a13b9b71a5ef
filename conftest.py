"""Fixtures and hooks for all tests of the project."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import pytest
from _pytest import pytester as pytester_module
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["pytester"]

# Imported modules and collected tests stay alive, and each garbage collection would search
# all of them. The collector is enabled after the collection of tests.
gc.disable()


@pytest.fixture
def pytester(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """Make inner runs use a device, so that not every test needs the option.

    A test of the default deletes the variable. No bytecode is written: Python would
    reuse it for a module that a test writes again within a second with the same length.
    """
    monkeypatch.setenv("PYTEST_ADDOPTS", "--gpu-backend=auto")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return pytester


@pytest.fixture
def as_read(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make inner runs use a device in the way that the README shows."""
    monkeypatch.delenv("PYTEST_ADDOPTS")
    page = Path(__file__).parent / "docs" / "quick-start.md"
    lines = page.read_text("utf-8").splitlines()
    at = lines.index("[tool.pytest.ini_options]")
    pytester.makepyprojecttoml("\n".join(lines[at : at + 2]))


settings.register_profile("dev", max_examples=30, deadline=None)
settings.register_profile(
    "ci",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Inner runs of pytest are strict only if a test says so, also when this run is in CI.
os.environ.pop("CI", None)

# No test may connect to a hub, and progress bars of loaders do not belong into reports.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Figures of the tests are those of torch up to 2.14, whose cuBLAS keeps its workspaces;
# tests/simulated/test_cublas_handles.py holds what torch does from 2.15 on.
os.environ.setdefault("TORCH_CUBLAS_WORKSPACE_CACHE", "1")
# Inner runs of pytest have a home of their own; checkpoints are built once for all.
os.environ.setdefault(
    "PYTEST_GPUMEM_CACHE",
    str(platformdirs.user_cache_path("pytest-gpumem") / "checkpoints"),
)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Leave out tests of values on the substitute runtime, whose kernels do nothing."""
    if "CUDA_HOST_BUILD" in os.environ:
        left_out = [each for each in items if each.get_closest_marker("needs_values")]
        items[:] = [each for each in items if each not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Collect garbage again."""
    gc.enable()
    _freeze()


#: Packages that are imported once for all inner runs of pytest. Parts of torch register
#: operators when they are imported, which raises when it is done again.
_IMPORTED_ONCE = {
    "accelerate",
    "functorch",
    "numpy",
    "pytest_gpumem",
    "torch",
    "transformers",
}


class _Snapshot(pytester_module.SysModulesSnapshot):
    """The modules before an inner run, which are put back after it."""

    def __init__(self, preserve: Callable[[str], bool]) -> None:
        super().__init__(
            lambda name: preserve(name) or name.partition(".")[0] in _IMPORTED_ONCE
        )


pytester_module.SysModulesSnapshot = _Snapshot  # type: ignore[assignment,misc]  # pytester has no option for it


#: A garbage collection of so few objects takes almost no time; a sweep makes hundreds.
_FEW_OBJECTS = 1_000


#: Python's own function counts one object after the other: 60 ms with torch imported. The
#: plugin asks only whether there are any.
_COUNT_FROZEN = gc.get_freeze_count


def _freeze() -> None:
    """Hide every object from the garbage collector, whose count of them is then not exact."""
    gc.collect()
    gc.freeze()
    gc.get_freeze_count = lambda: 1


@pytest.fixture(autouse=True)
def _heap_is_frozen() -> None:
    """Hide the imported objects from the garbage collector.

    The plugin collects garbage around every test. With torch and transformers imported
    those collections would take most of the time of most tests.
    """
    if len(gc.get_objects()) > _FEW_OBJECTS:
        _freeze()


@pytest.fixture
def thawed_heap(_heap_is_frozen: None) -> None:
    """Let collections and searches for holders see every object, as in a user's run.

    The next test freezes them again.
    """
    gc.unfreeze()
    gc.get_freeze_count = _COUNT_FROZEN


@pytest.fixture(autouse=True)
def _torch_is_as_before() -> object:
    """Check that no test leaves a machine, a patch or a random state behind."""
    if "torch" not in sys.modules:
        yield
        return
    from pytest_gpumem.devices.simulated import machine

    before = machine.innermost_machine()
    yield
    assert machine.innermost_machine() is before, "a simulated machine was left behind"
