"""The host's memory beside the cards', and host budgets."""

from __future__ import annotations

import gc
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported

from pytest_gpumem import host_memory
from pytest_gpumem.host_memory import ResidentPeak

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the system does not tell the pages"
)
MIB = 2**20
#: Pages that Python takes and gives back meanwhile.
NOISE = 16 * MIB


def _records(path: Path) -> dict[str, dict[str, Any]]:
    tests = json.loads((path / "r.json").read_text("utf-8"))["tests"]
    return {each["nodeid"].rpartition("::")[2]: each for each in tests}


def test_the_peak_is_that_of_the_block() -> None:
    """Not that of what the process did before."""
    large = bytearray(200 * MIB)
    del large
    gc.collect()  # what earlier tests left may not go in the middle of the block
    peak = ResidentPeak()
    start = peak.read()
    small = bytearray(64 * MIB)
    del small
    end = peak.read()

    assert start is not None
    assert end is not None
    assert abs(end - start - 64 * MIB) < NOISE


def test_where_the_peak_cannot_be_reset_only_a_new_one_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That of the whole lifetime would be another test's."""
    monkeypatch.setattr(host_memory, "_CLEAR", str(tmp_path / "none" / "clear_refs"))
    lifetime = [100 * MIB]
    monkeypatch.setattr(host_memory, "_lifetime_peak", lambda: lifetime[0])
    peak = ResidentPeak()

    assert peak.read() is None
    lifetime[0] = 101 * MIB
    assert peak.read() == 101 * MIB


def test_reports_have_the_hosts_peak(pytester: pytest.Pytester) -> None:
    """Of each test that used a card; the table with -v, Markdown and JSON."""
    pytester.makepyfile(
        """
        import torch

        def test_large():
            torch.ones(2, device="cuda")
            torch.ones(50 * 2**20)

        def test_small():
            torch.ones(2, device="cuda")

        def test_no_card():
            pass
        """
    )
    result = pytester.runpytest(
        "-v", "--gpu-report=json:r.json", "--gpu-report=md:r.md"
    )
    plain = pytester.runpytest("-v", "--gpu-backend=simulated")
    tests = _records(pytester.path)

    result.stdout.fnmatch_lines(["peak allocated*peak host  test", "*test_large"])
    plain.stdout.no_fnmatch_line("*peak host*")
    assert tests.keys() == {"test_large", "test_small"}
    large, small = (
        tests[f"test_{each}"]["peak_host_bytes"] for each in ("large", "small")
    )
    assert abs(large - small - 200 * MIB) < NOISE
    assert "| peak host |" in (pytester.path / "r.md").read_text("utf-8")


MODEL = """
import psutil
import pytest
import torch
from accelerate.utils import get_max_memory
from transformers import BertConfig, BertModel

MIB = 2**20
CONFIG = BertConfig(
    hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=20,
    vocab_size=100,
)  # 242 MiB


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    BertModel(CONFIG).save_pretrained(path)
    return path


def load(folder, **options):
    return BertModel.from_pretrained(folder, device_map="auto", **options)
"""


def test_plans_go_to_disk(pytester: pytest.Pytester) -> None:
    """Accelerate's and transformers'; the next test has the whole host again."""
    pytester.makepyfile(
        MODEL
        + """
WHOLE = psutil.virtual_memory()

@pytest.mark.gpu_budget("64MiB", host="100MiB")
def test_a_plan(folder):  # the model that the fixture makes is not the call's
    assert 80 * MIB < get_max_memory()["cpu"] <= 100 * MIB
    seen = psutil.virtual_memory()
    assert seen.total == 100 * MIB
    assert seen.available <= seen.total - seen.used
    places = set(load(folder, offload_folder=folder / "disk").hf_device_map.values())
    assert places == {0, "cpu", "disk"}

@pytest.mark.gpu_budget("64MiB")
def test_without(folder):
    assert psutil.virtual_memory().total == WHOLE.total
    assert set(load(folder).hf_device_map.values()) == {0, "cpu"}

@pytest.mark.gpu_budget(host="100MiB")
def test_what_is_on_a_simulated_card_is_not_on_the_host():
    kept = torch.ones(300 * MIB // 4, device="cuda")
    assert get_max_memory()["cpu"] > 80 * MIB
"""
    )
    result = pytester.runpytest("-p", "no:cacheprovider")

    result.assert_outcomes(passed=3)


def test_a_test_that_takes_more_fails(pytester: pytest.Pytester) -> None:
    """With its bytes; the values of a simulated card are not the host's."""
    pytester.makepyfile(
        """
        import time
        import torch

        def test_on_the_host():
            kept = [torch.ones(2**20) for _ in range(100)]
            time.sleep(0.5)
            del kept

        def test_on_the_card():
            kept = [torch.ones(2**20, device="cuda") for _ in range(100)]
            time.sleep(0.1)
            [each.add_(1) for each in kept]
            torch.stack(kept)
            del kept
            time.sleep(0.1)
        """
    )
    result = pytester.runpytest(
        "-p", "no:cacheprovider", "--gpu-host-budget=100MiB", "--gpu-report=json:r.json"
    )
    tests = _records(pytester.path)

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "host memory above the host budget: the test added * bytes) to it, budget "
            "100 MiB (104857600 bytes), * too much",
            "OVER VRAM LIMIT *::test_on_the_host *",
        ]
    )
    (limit,) = tests["test_on_the_card"]["limits"]
    assert limit["metric"] == "host"
    assert limit["held"] is True
    assert limit["limit_bytes"] == 100 * MIB


def test_what_makes_no_sense_is_refused(pytester: pytest.Pytester) -> None:
    """Before any test; a percentage, as nobody knows of what."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu_budget()
        def test_it():
            pass
        """
    )
    marked = pytester.runpytest("--gpu-backend=simulated")
    option = pytester.runpytest("--gpu-host-budget=50%")

    assert marked.ret == option.ret == pytest.ExitCode.USAGE_ERROR
    (
        marked.stderr if "give a size" in marked.stderr.str() else marked.stdout
    ).fnmatch_lines(
        [
            "*@pytest.mark.gpu_budget: give a size of the card, such as '4GiB', or host='8GiB'*"
        ]
    )
    option.stderr.fnmatch_lines(["*--gpu-host-budget: *"])


def test_a_system_that_does_not_tell_is_named(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Plans are limited all the same."""
    monkeypatch.setattr(host_memory, "_STATUS", str(tmp_path / "none"))
    pytester.makepyfile(
        """
        import psutil
        import torch

        def test_it():
            torch.ones(2, device="cuda")
            assert psutil.virtual_memory().available == 2**20
        """
    )
    result = pytester.runpytest("--gpu-host-budget=1MiB")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["host bytes unknown: this system has no /proc*"])
