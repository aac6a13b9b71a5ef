"""A test that fails for its memory is marked in GitHub's view of the pull request."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch  # noqa: F401  # an inner run would import it anew, which torch does not survive
from ways import WORKERS

from pytest_gpumem.reports.github_commands import (
    SourceLine,
    error_command,
    source_line_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

TESTS = """
    import pytest
    import torch

    from library import load

    def test_it_runs_out():
        load(64)

    @pytest.mark.max_vram("1MiB")
    def test_it_is_over_its_limit():
        load(2)

    @pytest.mark.max_vram("1MiB")
    def test_it_recovers_and_is_over_its_limit():
        try:
            load(64)
        except torch.OutOfMemoryError:
            load(2)

    @pytest.mark.max_vram_leak
    def test_it_leaks():
        load.kept = load(2)

    @pytest.fixture
    def large():
        return load(64)

    def test_its_fixture_runs_out(large):
        pass

    def test_it_fails_for_another_reason():
        assert load(1) is None

    def test_it_passes():
        load(1)
"""
LIBRARY = """
    import torch

    def load(mib):
        return torch.zeros(mib * 2**18, device="cuda")
"""


def commands(result: pytest.RunResult) -> list[str]:
    """Return the commands that GitHub would take from a run's output."""
    return [each for each in result.outlines if each.startswith("::")]


@pytest.mark.parametrize("workers", WORKERS)
def test_failures_are_marked_at_the_test_and_at_the_allocating_line(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: Sequence[str]
) -> None:
    """Once each, by the path from the checkout, whoever ran the test."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(pytester.path.parent))
    pytester.makepyfile(test_it=TESTS, library=LIBRARY)

    result = pytester.runpytest(
        "-p",
        "no:cacheprovider",
        "--gpu-backend=simulated",
        "--gpu-budget=32MiB",
        "--gpu-share=off",
        *workers,
    )

    here = pytester.path.name
    found = {
        (match["name"], match["title"]): (
            match["file"],
            int(match["line"]),
            match["text"],
        )
        for match in (
            re.fullmatch(
                "::error file=(?P<file>.*),line=(?P<line>.*),title=(?P<title>.*)"
                "::test_it.py::(?P<name>[a-z_]*): (?P<text>.*)",
                each,
            )
            for each in commands(result)
        )
        if match is not None
    }
    test, allocation = "GPU memory", "GPU memory%3A allocated here"
    assert len(found) == len(commands(result))
    assert {
        ("test_it_runs_out", test): 6,
        ("test_it_is_over_its_limit", test): 9,
        ("test_it_recovers_and_is_over_its_limit", test): 13,
        ("test_it_leaks", test): 20,
        ("test_its_fixture_runs_out", test): 28,
        ("test_it_runs_out", allocation): 4,
        ("test_it_is_over_its_limit", allocation): 4,
        ("test_it_recovers_and_is_over_its_limit", allocation): 4,
        ("test_its_fixture_runs_out", allocation): 4,
    } == {key: line for key, (_file, line, _text) in found.items()}
    assert {(test, f"{here}/test_it.py"), (allocation, f"{here}/library.py")} == {
        (title, file) for (_name, title), (file, _line, _text) in found.items()
    }
    assert found["test_it_runs_out", test][2].startswith("an allocation failed on")
    for name in ("test_it_is_over_its_limit", "test_it_recovers_and_is_over_its_limit"):
        assert found[name, test][2].startswith("peak VRAM above max_vram: allocated 2")
    assert "%0Aat library.py:4 in load" in found["test_it_runs_out", allocation][2]


@pytest.mark.parametrize("value", ["", "false"])
def test_nothing_is_marked_elsewhere(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """A step may say that it wants no marks."""
    monkeypatch.setenv("GITHUB_ACTIONS", value)
    pytester.makepyfile(test_it=TESTS, library=LIBRARY)

    result = pytester.runpytest("-p", "no:cacheprovider", "--gpu-budget=32MiB")

    assert [] == commands(result)


def test_a_text_can_end_no_command_and_begin_none() -> None:
    """What has a meaning to GitHub is escaped, in values more than in the message."""
    command = error_command(
        "100 %\r\n::error::a, b: c",
        title="a:b,c%\r\n",
        source_line=SourceLine(Path("/checkout/a,b:c/100%.py"), 3),
        root=Path("/checkout"),
    )

    assert (
        "::error file=a%2Cb%3Ac/100%25.py,line=3,title=a%3Ab%2Cc%25%0D%0A"
        "::100 %25%0D%0A::error::a, b: c"
    ) == command
    assert "::error title=t::m" == error_command("m", title="t")


def test_a_site_is_a_line_of_a_file_that_is_there(tmp_path: Path) -> None:
    """Code of an installed library, or of no file, is no line of the checkout."""
    (tmp_path / "a b.py").touch()
    folders = (tmp_path / "none", tmp_path)

    assert SourceLine(tmp_path / "a b.py", 12) == source_line_of(
        "a b.py:12 in f (load)", folders
    )
    for site in (
        "",
        "a b.py",
        "a b.py:0 in f",
        "torch/x.py:3 in f",
        "unknown site (load)",
    ):
        assert source_line_of(site, folders) is None
