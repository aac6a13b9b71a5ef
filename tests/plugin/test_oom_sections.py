"""What a failed test says of its memory, with workers and without."""

from __future__ import annotations

import pickle
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported
from torch.cuda import _memory_viz
from ways import WAYS, each_way

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

LIGHT = ("-p", "no:cacheprovider")
TESTS = """
    import pytest
    import torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.Linear(512, 512) for _ in range(8)
            )

    @pytest.fixture
    def placed():
        return Model().to("cuda")

    @pytest.mark.gpu_budget("6MiB")
    def test_too_small():
        Model().to("cuda")

    @pytest.mark.gpu_budget("6MiB")
    def test_too_small_in_setup(placed):
        pass

    @pytest.mark.inject_oom("load:nth=5")
    def test_injected():
        Model().to("cuda")

    @pytest.mark.max_vram("4MiB")
    def test_limit():
        model = Model().to("cuda")
        torch.zeros(2**20, device="cuda")

    @pytest.mark.inject_oom("load:nth=5")
    def test_recovered():
        try:
            Model().to("cuda")
        except torch.OutOfMemoryError:
            pass

    @pytest.mark.gpu_budget("32MiB")
    @pytest.mark.max_vram("4MiB")
    def test_recovered_and_over_the_limit():
        try:
            torch.zeros(2**24, device="cuda")
        except torch.OutOfMemoryError:
            torch.zeros(5 * 2**18, device="cuda")

    @pytest.mark.inject_oom("load:nth=5,flavour=not-oom")
    def test_no_oom():
        Model().to("cuda")

    def test_plain_failure():
        assert not torch.zeros(1, device="cuda").is_cuda
"""


def section(result: pytest.RunResult, test: str) -> str:
    """Return what a test's failure says under the heading, or nothing."""
    text = result.stdout.str()
    failure = text.partition(f" {test} ___")[2].partition("\n____")[0]
    return failure.partition(" GPU memory -")[2].partition("\n===")[0]


@pytest.mark.parametrize("way", each_way())
def test_a_failure_says_what_was_on_the_card(
    way: str, pytester: pytest.Pytester
) -> None:
    """Budget, figures, owners, advice, the rule, the limit, and a snapshot's path."""
    pytester.makepyfile(test_it=TESTS)
    result = pytester.runpytest(*LIGHT, *WAYS[way], "--gpu-snapshots=snaps")

    result.assert_outcomes(passed=1, failed=6, errors=1)
    oom = section(result, "test_too_small")
    for text in (
        "an allocation failed on cuda:0 (Tesla T4, 14.57 GiB), a budget of 6 MiB\n",
        "this process may hold 6 MiB\n",
        "requested 1 MiB at test_it.py:17 in test_too_small (load) for layers.",
        "  1 MiB  512x512 float32  layers.0.weight of Model\n",
        "needed at least 8.02 MiB: live ",
        "half precision: would fit (4.01 MiB of 6 MiB): ",
        "offload to the CPU: would fit (1 MiB of 6 MiB): ",
    ):
        assert text in oom
    assert "an allocation failed" in section(
        result, "ERROR at setup of test_too_small_in_setup"
    )
    injected = section(result, "test_injected")
    assert "an OOM was injected by the rule load:nth=5 on cuda:0 (" in injected
    assert "needed at least" not in injected
    limit = section(result, "test_limit")
    assert "the limit of 4 MiB allocated was broken on cuda:0 (" in limit
    assert (
        "exceeded it with a request of 1 MiB at test_it.py:29 in test_limit (load)"
        in limit
    )
    assert "layers.0.weight of Model" in limit
    recovered = section(result, "test_recovered_and_over_the_limit")
    assert "\nthe limit of 4 MiB allocated was broken on cuda:0 (" in recovered
    assert "it is the last of" not in recovered
    assert not section(result, "test_no_oom")
    assert not section(result, "test_plain_failure")

    files = sorted((pytester.path / "snaps").iterdir())
    assert [
        f"test_it.py-test_{name}"
        for name in (
            "injected",
            "limit",
            "recovered_and_over_the_limit",
            "too_small",
            "too_small_in_setup",
        )
    ] == [file.name.rpartition("-")[0] for file in files]
    for file in files:
        assert "<html>" in _memory_viz.trace_plot(_load(file)).lower()
    assert f"snapshot for https://pytorch.org/memory_viz: {files[3]}" in oom
    if "junit" in str(WAYS[way]):
        _check_junit(pytester.path / "junit.xml", str(files[3]))


def _load(file: Path) -> object:
    return pickle.loads(file.read_bytes())


def _check_junit(file: Path, snapshot: str) -> None:
    said = {
        case.get("name"): {
            each.get("name"): each.get("value") for each in case.iter("property")
        }
        for case in ET.parse(file).iter("testcase")  # noqa: S314  # our own file
    }
    too_small = said["test_too_small"]
    assert "an allocation failed on cuda:0" in str(too_small["gpumem.incident"])
    assert snapshot == too_small["gpumem.snapshot"]
    assert "gpumem.incident" not in said["test_recovered"]


def test_a_folder_that_cannot_be_used_ends_the_run(pytester: pytest.Pytester) -> None:
    """A file, one below a file, or one that nobody can write in: exit code 4."""
    pytester.makepyfile("def test_it(): raise AssertionError('ran')")
    (pytester.path / "file").write_text("", encoding="utf-8")
    for folder, words in (
        ("file", "is not a folder"),
        ("file/below", "is not a folder"),
        ("/proc/below", "nothing can be written in /proc"),
    ):
        result = pytester.runpytest(*LIGHT, f"--gpu-snapshots={folder}")

        assert pytest.ExitCode.USAGE_ERROR == result.ret
        result.stderr.fnmatch_lines([f"*--gpu-snapshots: '{folder}': *{words}*"])


def test_without_the_option_no_file_is_written(pytester: pytest.Pytester) -> None:
    """The section is there all the same, for the last of several OOMs."""
    pytester.makepyfile(
        """
        import pytest
        import torch

        @pytest.mark.gpu_budget("4MiB")
        def test_it():
            for mib in (8, 9):
                with pytest.raises(torch.OutOfMemoryError):
                    torch.zeros(mib * 2**20, dtype=torch.uint8, device="cuda")
            raise AssertionError
        """
    )
    before = set(pytester.path.iterdir())
    result = pytester.runpytest(*LIGHT)

    said = section(result, "test_it")
    assert "it is the last of 2 OOMs or broken limits in this test\n" in said
    assert "requested 9 MiB" in said
    assert before == {
        each for each in pytester.path.iterdir() if each.name != "__pycache__"
    }
