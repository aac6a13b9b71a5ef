"""The examples for CI gate a change, run by the shells that CI runs them with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
import yaml

from pytest_gpumem.baselines.baseline import Baseline

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).parents[2]
EXAMPLES: Final = ROOT / "examples" / "ci"
REQUIREMENTS: Final = "gpumem-requirements.txt"
PROJECT = """
import torch

def test_it():
    torch.zeros(SIZE * 2**18, device="cuda")
"""
#: Source: "Exit codes and error action preference" in GitHub's workflow syntax.
GITHUB_SHELLS: Final = {
    None: ("bash", "-e"),
    "bash": ("bash", "--noprofile", "--norc", "-eo", "pipefail"),
    "sh": ("sh", "-e"),
}


class Job(NamedTuple):
    """A job as its runner sees it: scripts in order, each with the shell that runs it."""

    scripts: list[tuple[tuple[str, ...], str]]
    variables: dict[str, str]


def github(text: str, folder: Path) -> Job:
    """Return the job of a workflow; a step's shell is its own, its job's or the file's."""
    document = yaml.safe_load(text)
    (job,) = document["jobs"].values()
    shells = [
        each.get("defaults", {}).get("run", {}).get("shell") for each in (job, document)
    ]
    scripts = [
        (
            GITHUB_SHELLS[next(filter(None, [step.get("shell"), *shells]), None)],
            step["run"],
        )
        for step in job["steps"]
        if "run" in step
    ]
    variables = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_WORKSPACE": str(folder),
        "GITHUB_STEP_SUMMARY": str(folder.parent / "summary.md"),
    }
    return Job(scripts, variables)


def gitlab(text: str, _folder: Path) -> Job:
    """Return the job of a pipeline: one script, as GitLab's runner puts it together."""
    (job,) = yaml.safe_load(text).values()
    lines = [
        "set -eo pipefail",
        "set +o noclobber",
        *job["before_script"],
        *job["script"],
    ]
    return Job([(("bash",), "\n".join(lines))], {"GITLAB_CI": "true"})


def shell(text: str, _folder: Path) -> Job:
    """Return the script, as a CI that knows shells only runs it."""
    return Job([(("sh", "-e"), text)], {})


KINDS: Final[dict[str, Callable[[str, Path], Job]]] = {
    "github.yml": github,
    "gitlab.yml": gitlab,
    "gpumem.sh": shell,
}


class Project:
    """A project that has copied the examples, with a test that needs so many MiB.

    Its ``python -m pip`` only notes what it is asked for: the environment is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.folder.mkdir()
        self.log = folder / "pip.log"
        (folder / "bin").mkdir()
        python = folder / "bin" / "python"
        python.write_text(
            "#!/bin/sh\n"
            f'[ "$1 $2" = "-m pip" ] && {{ echo "$*" >> "{self.log}"; exit 0; }}\n'
            f'exec "{sys.executable}" "$@"\n',
            encoding="utf-8",
        )
        python.chmod(0o755)
        self._environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("GITHUB_", "PYTEST_CURRENT", "PYTEST_XDIST"))
        } | {
            "CI": "true",
            "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def needs(self, mib: int) -> None:
        """Make the test need so many MiB."""
        test = self.folder / "test_it.py"
        test.write_text(PROJECT.replace("SIZE", str(mib)), encoding="utf-8")

    def run(self, job: Job) -> tuple[int, str]:
        """Run a job until one of its scripts fails; return its code and output."""
        output = ""
        for number, (command, script) in enumerate(job.scripts):
            file = self.folder.parent / f"step{number}.sh"
            file.write_text(script, encoding="utf-8")
            done = subprocess.run(
                [*command, str(file)],
                cwd=self.folder,
                env=self._environment | job.variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            output += done.stdout
            if done.returncode:
                return done.returncode, output
        return 0, output


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The committed file, written by the command that the page on CI shows."""
    project = Project(tmp_path_factory.mktemp("baseline"))
    project.needs(100)
    page = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    (command,) = re.findall(
        r"^\s*\$ pytest (.* --gpu-update-baseline)$", page, re.MULTILINE
    )
    code, output = project.run(Job([(("sh", "-e"), f"python -m pytest {command}")], {}))

    assert 0 == code, output
    return (project.folder / "gpu-baseline.json").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_regression_is_red_and_an_unchanged_tree_is_green(
    name: str, baseline: str, tmp_path: Path
) -> None:
    """Under each CI's own shell; the reports are there, the baseline is as it was."""
    project = Project(tmp_path)
    committed = project.folder / "gpu-baseline.json"
    committed.write_text(baseline, encoding="utf-8")
    job = KINDS[name]((EXAMPLES / name).read_text(encoding="utf-8"), project.folder)

    project.needs(100)
    same = project.run(job)
    project.needs(106)
    more = project.run(job)

    assert 1 == len(Baseline.parse(baseline, name).peaks)
    assert (0, 1) == (same[0], more[0]), same[1] + more[1]
    assert "100 MiB -> 106 MiB (+6 MiB, +6.0 %)" in more[1]
    reports = {each.name for each in (project.folder / "reports").iterdir()}
    assert {"junit.xml", "gpumem.json"} <= reports
    assert baseline == committed.read_text(encoding="utf-8")
    asked = project.log.read_text(encoding="utf-8").splitlines()
    assert 2 * [f"-m pip install -r {REQUIREMENTS}", "-m pip install -e ."] == asked
    marks = [each for each in more[1].splitlines() if each.startswith("::error ")]
    if name != "github.yml":
        assert [] == marks
        return
    assert 1 == len(marks)
    assert marks[0].startswith("::error file=test_it.py,line=4,title=GPU memory::")
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("## GPU memory\n")
    assert "106 MiB" in summary


def test_the_shells_are_those_of_the_runner(tmp_path: Path) -> None:
    """A pipe hides a failure where no shell is named, and nowhere else."""
    project = Project(tmp_path)
    step = {"run": "false | cat"}
    for shell_of_file, shell_of_step, code in (
        (None, None, 0),
        ("bash", None, 1),
        ("bash", "sh", 0),
        (None, "bash", 1),
    ):
        document = {
            "defaults": {"run": {"shell": shell_of_file}},
            "jobs": {"it": {"steps": [{**step, "shell": shell_of_step}]}},
        }
        job = github(yaml.safe_dump(document), project.folder)

        assert code == project.run(job)[0]

    pipeline = {"it": {"before_script": [], "script": ["false | cat"]}}
    assert 1 == project.run(gitlab(yaml.safe_dump(pipeline), project.folder))[0]


def test_the_workflow_asks_for_what_it_needs_and_has() -> None:
    """A hosted runner, the right to read, reports kept whatever happens."""
    document: dict[str, Any] = yaml.safe_load(
        (EXAMPLES / "github.yml").read_text(encoding="utf-8")
    )
    (job,) = document["jobs"].values()
    (keep,) = (
        each for each in job["steps"] if "upload-artifact" in each.get("uses", "")
    )

    assert {"contents": "read"} == document["permissions"]
    assert "ubuntu-latest" == job["runs-on"]
    assert ("always()", "reports") == (keep["if"], keep["with"]["path"])
    (pipeline,) = yaml.safe_load(
        (EXAMPLES / "gitlab.yml").read_text(encoding="utf-8")
    ).values()
    assert ("always", ["reports"]) == tuple(
        pipeline["artifacts"][name] for name in ("when", "paths")
    )


def test_what_is_installed_is_there_and_pinned() -> None:
    """The plugin by a path, torch by its version; of an index only what it has."""
    lines = [
        line
        for line in (EXAMPLES / REQUIREMENTS).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    torch = re.findall(r"^ +(torch==\S+)$", tox, re.MULTILINE)[0]

    assert re.fullmatch(
        r"\./wheels/pytest_gpumem-[0-9.]+-py3-none-any\.whl\[hf\]", lines[0]
    )
    assert [torch, "--extra-index-url https://download.pytorch.org/whl/cpu"] == lines[
        1:
    ]
