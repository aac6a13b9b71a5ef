"""What every test of the project shares."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from pathlib import Path

import platformdirs
import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

# What is imported and collected lives on, and garbage collections would search all of it
# again and again. They begin with the first test.
gc.disable()


@pytest.fixture
def pytester(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """Have inner runs ask for a device, in place of an option in every test.

    A test of what a run does by itself deletes the variable. A module that a test writes
    again within a second, as long as before, would be taken from the cache of bytecode.
    """
    monkeypatch.setenv("PYTEST_ADDOPTS", "--gpu-backend=auto")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return pytester


@pytest.fixture
def as_read(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have inner runs ask for a device as the first page tells its readers to do."""
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

# Inner runs of pytest are strict where a test says so, not where this run is CI's.
os.environ.pop("CI", None)

# Nothing here may look for a hub, and loaders' progress bars are noise in reports.
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
    """Import what torch and the plugin import only when it is needed.

    An inner run of pytest drops what it was the first to import. Parts of torch register
    libraries, which raises when it is done again; the plugin's modules would be imported
    again by each inner run.
    """
    for name in ("collection", "session", "summary"):
        importlib.import_module(f"pytest_gpumem.plugin.{name}")
    if "torch" in sys.modules:
        for name in ("distributed._functional_collectives", "_dynamo"):
            importlib.import_module(f"torch.{name}")
    gc.enable()


#: As many objects as are collected in no time; a sweep collects hundreds of times.
_FEW_OBJECTS = 1_000


@pytest.fixture(autouse=True)
def _heap_is_frozen() -> None:
    """Keep what was imported out of the garbage collector's sight.

    The plugin collects garbage around every test. With torch and transformers imported
    those collections would take most of the time of most tests.
    """
    if len(gc.get_objects()) > _FEW_OBJECTS:
        gc.collect()
        gc.freeze()


@pytest.fixture
def thawed_heap(_heap_is_frozen: None) -> None:
    """Show collections and searches for holders every object, as in a user's run.

    The next test freezes them again.
    """
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _torch_is_as_before() -> object:
    """Hold every test to leaving no machine, patch or random state behind."""
    if "torch" not in sys.modules:
        yield
        return
    from pytest_gpumem.devices.simulated import machine

    before = machine.innermost_machine()
    yield
    assert machine.innermost_machine() is before, "a simulated machine was left behind"
