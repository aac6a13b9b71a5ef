"""The wheel as it is installed, in an environment without torch: tox run -e package."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

DISTRIBUTION = metadata.distribution("pytest-gpumem")
PROJECT = Path(__file__).parents[2]


def _run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_is_the_wheel_that_is_tested() -> None:
    """Not the project's own folder; and torch is not there."""
    spec = importlib.util.find_spec("pytest_gpumem")

    assert spec is not None
    assert spec.origin is not None
    assert PROJECT / "pytest_gpumem" not in Path(spec.origin).parents
    assert importlib.util.find_spec("torch") is None


@pytest.mark.parametrize(
    "name",
    [
        "pytest_gpumem/py.typed",
        "pytest_gpumem/reports/report.schema.json",
        "pytest_gpumem/reports/templates/report.html",
        "pytest_gpumem/reports/templates/report.css",
        "pytest_gpumem/reports/templates/report.js",
        "pytest_gpumem/children/shim/sitecustomize.py",
        "pytest_gpumem_child.pth",
        "pytest_gpumem/nvidia_smi/bin/nvidia-smi",
    ],
)
def test_a_file_beside_the_code_is_installed(name: str) -> None:
    """Templates, schema, types, and what reaches child processes."""
    assert name in {str(each) for each in DISTRIBUTION.files or ()}


def test_nvidia_smi_can_be_run() -> None:
    """Pip keeps the mark of a program."""
    (program,) = (
        each for each in DISTRIBUTION.files or () if each.name == "nvidia-smi"
    )

    assert os.access(program.locate(), os.X_OK)


def test_nothing_else_is_installed() -> None:
    """Neither tests nor docs."""
    files = [each for each in DISTRIBUTION.files or () if ".." not in each.parts]

    roots = {each.parts[0].partition("-")[0] for each in files}

    assert {"pytest_gpumem", "pytest_gpumem_child.pth"} == roots


def test_the_metadata_says_what_it_is() -> None:
    """Pythons, the framework, and extras that are small."""
    about = DISTRIBUTION.metadata
    classifiers = about.get_all("Classifier")

    assert classifiers is not None
    for minor in range(10, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert {"Framework :: Pytest", "Typing :: Typed"} <= set(classifiers)
    assert "MIT" == about["License-Expression"]
    assert {"hf", "hypothesis", "nvml", "report"} == set(
        about.get_all("Provides-Extra") or ()
    )
    requires = [each for each in DISTRIBUTION.requires or () if "extra ==" not in each]
    names = {each.partition(">")[0] for each in requires}
    assert {"filelock", "platformdirs", "pytest"} == names


def test_the_readme_leads_from_an_index_to_the_project(tmp_path: Path) -> None:
    """Pictures and pages have a whole address once the project has one."""
    hook: Any = runpy.run_path(str(PROJECT / "hatch_build.py"))["CustomMetadataHook"]
    text = "![It](docs/it.png) [a](docs/a.md#b) [here](#here) [web](https://web.org)"
    (tmp_path / "README.md").write_text(text)
    plain: dict[str, Any] = {}
    linked: dict[str, Any] = {"urls": {"Source": "https://host.org/us/it"}}
    for each in (plain, linked):
        hook(str(tmp_path), {}).update(each)

    assert {"content-type": "text/markdown", "text": text} == plain["readme"]
    assert (
        "![It](https://host.org/us/it/raw/HEAD/docs/it.png) "
        "[a](https://host.org/us/it/blob/HEAD/docs/a.md#b) "
        "[here](#here) [web](https://web.org)"
    ) == linked["readme"]["text"]


#: A project's environment with the oldest versions that are supported, all pinned.
PINNED = {
    "accelerate": "1.10.0",
    "filelock": "3.12.0",
    "hypothesis": "6.100.0",
    "jinja2": "3.1.0",
    "numpy": "1.26.0",
    "nvidia-ml-py": "12.560.30",
    "platformdirs": "4.0.0",
    "pytest": "8.0.0",
    "safetensors": "0.5.0",
    "torch": "2.8.0+cu128",
    "transformers": "4.57.0",
}
_METADATA = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n"


def _wheel(folder: Path, name: str, version: str, metadata: str) -> None:
    """Make a wheel of nothing but metadata."""
    about = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{about}-py3-none-any.whl", "w") as wheel:
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for file, text in (("METADATA", metadata), ("WHEEL", tag), ("RECORD", "")):
            wheel.writestr(f"{about}.dist-info/{file}", text)


@pytest.mark.parametrize("extra", ["", "[hf,nvml,hypothesis,report]"])
def test_nothing_that_is_there_is_upgraded(tmp_path: Path, extra: str) -> None:
    """Into a pinned environment pip installs this wheel alone, whatever is newer."""
    index, environment = tmp_path / "index", tmp_path / "environment"
    index.mkdir()
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python3*/site-packages")
    for name, version in PINNED.items():
        about = site / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(_METADATA.format(name, version))
        _wheel(index, name, "999.0", _METADATA.format(name, "999.0"))
    metadata = DISTRIBUTION.read_text("METADATA") or ""
    _wheel(index, "pytest-gpumem", DISTRIBUTION.version, metadata)

    done = _run(
        "pip",
        *("--python", str(environment / "bin" / "python"), "install", "--dry-run"),
        *("--no-index", "--find-links", str(index), "--quiet", "--report", "-"),
        f"pytest-gpumem{extra}",
    )

    assert 0 == done.returncode, done.stderr
    installed = json.loads(done.stdout)["install"]
    assert ["pytest-gpumem"] == [each["metadata"]["name"] for each in installed]


def test_pytest_knows_the_plugin(tmp_path: Path) -> None:
    """By its entry point alone."""
    assert 0 == _run("pytest", "--version", cwd=tmp_path).returncode
    assert "--gpu-budget" in _run("pytest", "--help", cwd=tmp_path).stdout


def test_a_suite_without_torch_passes(pytester: pytest.Pytester) -> None:
    """A test that needs a card says that there is none."""
    pytester.makepyfile(
        test_it="""
        import pytest

        def test_plain():
            pass

        @pytest.mark.max_vram("1GiB")
        def test_limit():
            pass

        def test_card(vram_recorder):
            with vram_recorder():
                pass
        """
    )

    done = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "-v", "--gpu-backend=auto"
    )

    done.stdout.fnmatch_lines(
        [
            "gpumem: backend off (torch is not installed)",
            "test_it.py::test_plain PASSED*",
            "*the backend is off: torch is not installed*",
        ]
    )
    assert 1 == done.ret


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["doctor"], 1),
        (["record", "--checkpoint", "none", "--out", "x.json"], 1),
        (["record", "--simulate", "T4", "--checkpoint", "none", "--out", "x.json"], 1),
        (["checkpoint", "bert-tiny"], 1),
        (["report", "missing.json"], 1),
    ],
)
def test_the_command_says_what_it_lacks(
    arguments: list[str], code: int, tmp_path: Path
) -> None:
    """In a sentence, without a traceback."""
    done = _run("pytest_gpumem.cli", *arguments, cwd=tmp_path)

    assert code == done.returncode
    assert "Traceback" not in done.stderr
    words = ("install torch", "needs torch", "missing.json", "usage:")
    assert any(each in done.stdout + done.stderr for each in words)


def test_python_starts_in_peace(tmp_path: Path) -> None:
    """What is looked at in every start of this Python says nothing and imports nothing."""
    code = (
        "import sys; print([n for n in sys.modules if n.startswith('pytest_gpumem')])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )

    assert ("[]\n", "") == (done.stdout, done.stderr)
