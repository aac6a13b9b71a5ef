"""What is wrong with a run beside its tests: files that it writes, and strict runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch  # noqa: F401  # inner runs cannot be the first to import it

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

OPTIONS = ("-p", "no:cacheprovider", "--gpu-backend=simulated")
TEST = """
    import torch

    def test_it():
        torch.zeros(2**18, device="cuda")
"""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--gpu-baseline=b.json", "--gpu-report=json:b.json"],
            "*--gpu-report=json:b.json: --gpu-baseline is the same file (b.json)*",
        ),
        (["--gpu-report=json:r", "--gpu-report=md:./r"], "*same file (r)*"),
        (["--gpu-report=json:r", "--gpu-report=md:link"], "*same file (link)*"),
        (["--gpu-report=json:j.xml", "--junitxml=j.xml"], "*same file (j.xml)*"),
        (["--gpu-report=md:folder"], "*cannot be written: it is a folder*"),
        (
            ["--gpu-baseline=folder", "--gpu-update-baseline"],
            "*--gpu-baseline: *folder cannot be written: it is a folder*",
        ),
    ],
)
def test_outputs_that_cannot_be_end_the_run(
    options: list[str], words: str, pytester: pytest.Pytester
) -> None:
    """Before any test, with exit code 4, and nothing is made or changed."""
    pytester.makepyfile("raise AssertionError")
    (pytester.path / "b.json").write_text("mine", encoding="utf-8")
    (pytester.path / "link").symlink_to("r")
    pytester.mkdir("folder")
    before = sorted(pytester.path.iterdir())

    result = pytester.runpytest(*OPTIONS, *options)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([words])
    assert before == sorted(pytester.path.iterdir())
    assert "mine" == (pytester.path / "b.json").read_text(encoding="utf-8")


def test_what_cannot_be_written_at_the_end_hides_nothing(
    pytester: pytest.Pytester,
) -> None:
    """Failures are shown first, every other file is there, the exit code is not 0."""
    spoil = """
    def test_spoil():
        import pathlib, shutil

        shutil.rmtree("gone")
        pathlib.Path("gone").touch()
    """
    pytester.makepyfile(test_it=TEST + spoil)
    options = [
        "--gpu-report=md:gone/r.md",
        "--gpu-report=json:r.json",
        "--gpu-baseline=gone/b.json",
        "--gpu-update-baseline",
    ]
    for fails in (True, False):
        pytester.mkdir("gone")
        bad = "def test_bad(): assert 0" if fails else ""
        pytester.makepyfile(test_it=TEST + spoil, test_other=bad)
        (pytester.path / "r.json").unlink(missing_ok=True)

        result = pytester.runpytest(*OPTIONS, *options)

        assert pytest.ExitCode.TESTS_FAILED == result.ret
        result.stdout.fnmatch_lines(
            [
                *["*= FAILURES =*"] * fails,
                "*= GPU memory: not everything that was requested was done =*",
                "--gpu-update-baseline: gone*b.json cannot be written: *",
                "--gpu-report: *gone*r.md cannot be written: *",
                f"*{'1 failed, ' * fails}2 passed, 2 errors in *",
            ]
        )
        assert (pytester.path / "r.json").exists()
        (pytester.path / "gone").unlink()


@pytest.mark.parametrize("option", ["--collect-only", "--setup-plan", "--fixtures"])
def test_a_run_that_runs_nothing_writes_nothing(
    option: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of an earlier run stay as they are."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary"))
    pytester.makepyfile(test_it=TEST)
    options = (
        "--gpu-report=json:r.json",
        "--gpu-baseline=b.json",
        "--gpu-update-baseline",
    )
    pytester.runpytest(*OPTIONS, *options)
    before = {each: (pytester.path / each).read_bytes() for each in _files(pytester)}

    pytester.runpytest(*OPTIONS, *options, option)

    assert {"r.json", "b.json", "summary"} <= set(before)
    assert before == {
        each: (pytester.path / each).read_bytes() for each in _files(pytester)
    }


def _files(pytester: pytest.Pytester) -> list[str]:
    return [each.name for each in pytester.path.iterdir() if each.is_file()]


def test_a_link_stays_a_link(pytester: pytest.Pytester, tmp_path: Path) -> None:
    """What it names is written, in its own folder."""
    real = tmp_path / "real.json"
    (pytester.path / "b.json").symlink_to(real)
    pytester.makepyfile(test_it=TEST)

    pytester.runpytest(*OPTIONS, "--gpu-baseline=b.json", "--gpu-update-baseline")

    assert (pytester.path / "b.json").is_symlink()
    assert "test_it.py::test_it" in real.read_text(encoding="utf-8")
    assert [real] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gpu_leak_check = maybe", "*gpu_leak_check: *maybe*"),
        (
            "gpu_strict = perhaps",
            "*gpu_strict: 'perhaps' is unknown; accepted are auto*",
        ),
        (
            "gpu_compare_fail = reserved",
            "*gpu_compare_fail: 'reserved' is half a tolerance; * reserved:16MiB*",
        ),
        (
            "gpu_compare_fail = 0GiB",
            "*gpu_compare_fail: '0GiB' is half a tolerance; * allocated:5% *",
        ),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(
    line: str, words: str, pytester: pytest.Pytester
) -> None:
    """With what is accepted; before any test."""
    pytester.makeini(f"[pytest]\n{line}\n")
    pytester.makepyfile("raise AssertionError")

    result = pytester.runpytest(*OPTIONS)

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([words])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu-replay-oom=any:nth=1"], "--gpu-replay-oom=any:nth=1: nothing was *"),
        (["--gpu-inject-oom=load:nth=9"], "--gpu-inject-oom=load:nth=9 was never *"),
        (
            ["--gpu-backend=off", "--gpu-max-vram=1GiB", "--gpu-leak-check"],
            "--gpu-max-vram, --gpu-leak-check: it had no effect, because the backend *",
        ),
    ],
)
def test_what_was_asked_for_and_held_nothing_is_said(
    options: list[str], words: str, pytester: pytest.Pytester
) -> None:
    """Below everything else; a strict run fails for it, one that lists tests does not."""
    pytester.makepyfile("def test_it(): pass")

    said = pytester.runpytest(*OPTIONS, *options)
    strict = pytester.runpytest(*OPTIONS, *options, "--gpu-strict")
    listed = pytester.runpytest(*OPTIONS, *options, "--gpu-strict", "--co")

    assert [pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.OK] == [
        said.ret,
        strict.ret,
        listed.ret,
    ]
    said.stdout.fnmatch_lines(
        [words, "in CI, or with --gpu-strict, this fails the run"]
    )
    strict.stdout.fnmatch_lines([words, "*1 passed, 1 error in *"])
    listed.stdout.no_fnmatch_line(words)
