"""The example of a workflow gates a pull request, its steps run as written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_gpumem.baselines.baseline import Baseline

ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / "examples" / "github-actions" / "gpumem.yml"
PROJECT = """
import torch

def test_it():
    torch.zeros(SIZE * 2**18, device="cuda")
"""


@pytest.fixture(scope="module", name="steps")
def read_steps() -> dict[str, Any]:
    """The job's steps by name, as YAML has them."""
    document = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    (job,) = document["jobs"].values()
    return {str(step.get("name", step.get("uses", ""))): step for step in job["steps"]}


def _run(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub's runner does: bash, ending at the first error."""
    file = folder / "step.sh"
    file.write_text(script, encoding="utf-8")
    environment = {
        **os.environ,
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("PYTEST_CURRENT_TEST", None)
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(file)],  # noqa: S607  # the runner's shell
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_workflow_gates_on_a_runner_without_a_gpu(
    steps: dict[str, Any], tmp_path: Path
) -> None:
    """The committed peak passes; six percent more fail, and the summary says why."""
    test = steps["Test"]["run"]
    file = tmp_path / "test_it.py"
    file.write_text(PROJECT.replace("SIZE", "100"), encoding="utf-8")
    written = _run(
        test.replace("pytest \\", "pytest --gpu-update-baseline \\"), tmp_path
    )
    committed = (tmp_path / "gpu-baseline.json").read_text(encoding="utf-8")
    same = _run(test, tmp_path)
    file.write_text(PROJECT.replace("SIZE", "106"), encoding="utf-8")
    more = _run(test, tmp_path)

    assert 0 == written.returncode, written.stdout + written.stderr
    assert 1 == len(Baseline.parse(committed, "gpu-baseline.json").peaks)
    assert (0, 1) == (same.returncode, more.returncode), same.stdout
    assert "allocated 100 MiB -> 106 MiB (+6 MiB, +6.0 %)" in more.stdout
    page = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert page.startswith("## GPU memory\n")
    assert "106 MiB" in page
    assert {"junit.xml", "output.txt"} <= {
        each.name for each in (tmp_path / "reports").iterdir()
    }
    assert committed == (tmp_path / "gpu-baseline.json").read_text(encoding="utf-8")


def test_the_workflow_asks_for_no_gpu(steps: dict[str, Any]) -> None:
    """A hosted runner, torch's build for CPUs, reports kept whatever happens."""
    (job,) = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()

    assert "ubuntu-latest" == job["runs-on"]
    assert "whl/cpu" in steps["Install"]["run"]
    assert "always()" == steps["Keep the reports"]["if"]
    assert "reports" == steps["Keep the reports"]["with"]["path"]
