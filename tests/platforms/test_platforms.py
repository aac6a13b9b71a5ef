"""The plugin where the system lacks what Linux has: each absence is imitated here.

Nothing of it has run on Windows or macOS; what these tests show is that the plugin asks
for nothing that they lack.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

#: Each starts several Pythons that import torch.
pytestmark = pytest.mark.slow

PLATFORMS = Path(__file__).parents[1] / "support" / "platforms"

SUITE = """
import os, subprocess, sys, time
import pytest, torch

from pytest_gpumem import check_fallback, gpu_load_lock


def test_the_platform_is_imitated():
    assert "like_" + os.environ["IMITATED_PLATFORM"] in sys.modules


def test_a_limit_is_broken():
    torch.ones(2**20, device="cuda")


test_a_limit_is_broken = pytest.mark.max_vram("1MiB")(test_a_limit_is_broken)


def test_a_budget_holds():
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(2**25, device="cuda")


@pytest.mark.inject_oom("any:nth=1")
def test_a_fault_strikes():
    with pytest.raises(torch.OutOfMemoryError):
        torch.ones(8, device="cuda")


def infer():
    try:
        return torch.ones(2**10, device="cuda").cpu()
    except torch.OutOfMemoryError:
        return torch.ones(2**10)


@pytest.mark.oom_sweep(recover=True)
def test_a_sweep_passes():
    assert infer().sum() == 2**10


@pytest.mark.oom_sweep(recover=True, modes=("transient",), timeout_s=0.5)
def test_a_hang_ends():
    try:
        torch.ones(8, device="cuda")
    except torch.OutOfMemoryError:
        for _time in range(600):
            time.sleep(0.1)


def test_a_child_has_the_budget():
    code = (
        "import torch\\n"
        "try:\\n torch.ones(2**25, device='cuda')\\n"
        "except torch.OutOfMemoryError:\\n print('no room')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout == "no room\\n", said.stderr


def test_a_child_has_peaks():
    code = "import torch; x = torch.ones(2**20, device='cuda')"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_lock_holds(tmp_path):
    with gpu_load_lock(0, folder=tmp_path), gpu_load_lock(0, folder=tmp_path):
        with pytest.raises(TimeoutError):
            from concurrent.futures import ThreadPoolExecutor

            def other():
                with gpu_load_lock(0, folder=tmp_path, timeout_s=0.1):
                    pass

            with ThreadPoolExecutor(1) as pool:
                pool.submit(other).result()


def test_a_process_competes(competing_process):
    with competing_process("32MiB"):
        assert torch.cuda.mem_get_info()[0] <= 64 * 2**20


def test_a_fallback_is_judged(fallback):
    def load():
        model = torch.nn.Linear(8, 8)
        try:
            return model.to("cuda")
        except torch.OutOfMemoryError:
            return model.to("cpu")

    fallback(load, budgets=[], faults=["any:nth=1"]).check()
"""
FAILS = {"test_a_limit_is_broken", "test_a_hang_ends"}


def _run(pytester: pytest.Pytester, platform: str, *arguments: str) -> pytest.RunResult:
    suite = pytester.makepyfile(test_suite=SUITE)
    if platform == "windows":  # as git checks files out there
        suite.write_bytes(suite.read_bytes().replace(b"\n", b"\r\n"))
    paths = [str(PLATFORMS), str(PLATFORMS / "start"), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("IMITATED_PLATFORM", platform)
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        return pytester.run(
            sys.executable,
            *("-m", "pytest", "-p", "no:cacheprovider", "--gpu-backend=simulated"),
            *("--gpu-budget=64MiB", "-W", "error"),
            # The library takes the system for Linux, and misses its locks.
            *("-W", "ignore:only soft file lock", *arguments),
        )


@pytest.mark.parametrize(
    "platform", ["windows", pytest.param("macos", marks=pytest.mark.slow)]
)
def test_every_feature_works(pytester: pytest.Pytester, platform: str) -> None:
    """Budgets, limits, faults, sweeps, children, locks, reports and the baseline."""
    result = _run(
        pytester,
        platform,
        *("--gpu-baseline=base.json", "--gpu-update-baseline"),
        *(
            "--gpu-report=json:r.json",
            "--gpu-report=html:r.html",
            "--gpu-report=md:r.md",
        ),
    )

    report = json.loads((pytester.path / "r.json").read_text("utf-8"))
    outcomes = {
        each["nodeid"].partition("::")[2]: each["outcome"] for each in report["tests"]
    }
    failed = {name for name, outcome in outcomes.items() if outcome != "passed"}
    assert FAILS == failed, result.stdout.str()
    assert (pytester.path / "base.json").is_file()
    result.stdout.fnmatch_lines(["*4 MiB*::test_a_limit_is_broken", "*hang*"])


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["windows", "macos"])
def test_workers_share_the_tests(pytester: pytest.Pytester, platform: str) -> None:
    """Under pytest-xdist; where cards cannot be shared each worker has its own."""
    result = _run(pytester, platform, "-n", "2", "-k", "budget or fault or platform")

    result.assert_outcomes(passed=4)
