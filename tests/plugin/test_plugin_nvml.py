"""Process and card bytes of a test: in every report, or why they are not known."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported
from ways import WAYS, each_way

pytest.importorskip("pynvml")

from fake_nvml import WORDS  # it needs pynvml

pytest_plugins = ["pytester"]

MIB = 2**20
GIB = 2**30

SHARED = """
    import pytest
    import torch

    @pytest.fixture
    def _tenant(competing_process):
        with competing_process("1GiB"):
            yield

    def test_it(_tenant):
        torch.zeros(20 * 2**20, dtype=torch.uint8, device="cuda")
    """

#: A run whose card is asked as a real one is, by a library as on other machines.
AS_REAL = """
import pytest
import torch

from fake_nvml import machines
from pytest_gpumem.devices.cuda import CudaDevice

def pytest_sessionstart(session):
    run = session.config.pluginmanager.get_plugin("gpumem-session")
    run.require_device()
    run._nvml.stop()
    patch = pytest.MonkeyPatch()
    session.config.add_cleanup(patch.undo)
    machines("00000000-0000-0000-0000-000000000000")[{ail!r}].install(patch)
    patch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda _i: True, raising=False)
    run.device = CudaDevice()
"""
LIMITED = """
import pytest
import torch

@pytest.mark.max_vram("100MiB", metric="process")
def test_small():
    torch.zeros(20 * 2**20, dtype=torch.uint8, device="cuda")

@pytest.mark.max_vram("10MiB", metric="process")
def test_large():
    torch.zeros(20 * 2**20, dtype=torch.uint8, device="cuda")

def test_without_a_limit():
    torch.zeros(20 * 2**20, dtype=torch.uint8, device="cuda")
"""


def _call(path: Any, name: str = "") -> dict[str, Any]:
    report = json.loads(path.read_text(encoding="utf-8"))
    (test,) = (each for each in report["tests"] if name in each["nodeid"])
    (call,) = (each for each in test["figures"] if each["phase"] == "call")
    return {**call, "unknown": test["unknown"]}


@pytest.mark.parametrize("way", each_way())
def test_a_report_tells_process_and_card(way: str, pytester: pytest.Pytester) -> None:
    """With its context, and with whoever else is on the card."""
    pytester.makepyfile(SHARED)
    result = pytester.runpytest(
        "-v",
        "-p",
        "no:cacheprovider",
        "--gpu-card=16GiB,ctx=300MiB",
        "--gpu-report=json:report.json",
        *WAYS[way],
    )

    result.assert_outcomes(passed=1)
    call = _call(pytester.path / "report.json")
    assert 320 * MIB == call["peak_process_bytes"]
    assert GIB + 320 * MIB == call["peak_card_bytes"]
    assert call["unknown"] is None
    result.stdout.fnmatch_lines(
        [
            "peak allocated  peak reserved  peak process  peak card  left *",
            "*20 MiB *20 MiB *320 MiB *1.31 GiB * test_*::test_it*",
        ]
    )
    if "junit" in str(WAYS[way]):
        properties = {
            each.get("name"): each.get("value")
            for each in ET.parse(pytester.path / "junit.xml").iter("property")  # noqa: S314  # our own file
        }
        assert (
            str(call["peak_card_bytes"])
            == (properties["gpumem.call.cuda0.peak_card_bytes"])
        )
        assert str(320 * MIB) == properties["gpumem.call.cuda0.peak_process_bytes"]


def test_without_a_report_or_limit_nobody_samples(pytester: pytest.Pytester) -> None:
    """No thread is started, and nothing is told of the card."""
    pytester.makepyfile(
        """
        import threading

        import pytest
        import torch

        def test_it():
            torch.zeros(1, device="cuda")
            assert "gpumem-sampler" not in str(threading.enumerate())

        @pytest.mark.max_vram("200MiB", metric="process")
        def test_limited():
            torch.zeros(1, device="cuda")
            assert "gpumem-sampler" in str(threading.enumerate())
        """
    )

    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=2)


@pytest.mark.parametrize("ail", WORDS)
def test_what_nvml_cannot_tell_is_said(ail: str, pytester: pytest.Pytester) -> None:
    """Once in the summary, in the report, and by a limit that cannot be checked.

    A limit that is broken by what is known is broken all the same.
    """
    pytester.makeconftest(AS_REAL.format(ail=ail))
    pytester.makepyfile(LIMITED)
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "--gpu-report=json:report.json"
    )

    result.assert_outcomes(passed=1, failed=2)
    text = result.stdout.str()
    lines = [line for line in text.splitlines() if line.startswith("process bytes unk")]
    assert 1 == len(lines)
    assert WORDS[ail] in lines[0]
    assert "max_vram(metric='process') cannot be checked on cuda:0: process " in text
    assert "20 MiB of the limit of 100 MiB were reserved at most; limit them " in text
    assert "peak VRAM above max_vram: process at least 20 MiB (20971520 bytes)" in text
    call = _call(pytester.path / "report.json", "test_without")
    assert call["peak_process_bytes"] is None
    assert lines[0] == call["unknown"]


def test_what_nvml_tells_counts(pytester: pytest.Pytester) -> None:
    """What lies beside the allocator's bytes is the process's, too."""
    pytester.makeconftest(AS_REAL.format(ail="well"))
    pytester.makepyfile(LIMITED)
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "--gpu-report=json:report.json"
    )

    result.assert_outcomes(passed=1, failed=2)
    text = result.stdout.str()
    assert "peak VRAM above max_vram: process 300 MiB (314572800 bytes)" in text
    assert "process bytes unknown" not in text
    call = _call(pytester.path / "report.json", "test_without")
    assert (300 * MIB, 500 * MIB) == (
        call["peak_process_bytes"],
        call["peak_card_bytes"],
    )
    assert 280 * MIB == call["context_bytes"]


def test_a_card_may_be_lost_in_the_middle(pytester: pytest.Pytester) -> None:
    """What was seen before is no peak; the test and the run go on."""
    pytester.makeconftest(AS_REAL.format(ail="well"))
    pytester.makepyfile(
        """
        import pytest
        import pynvml
        import torch

        from fake_nvml import PROCESSES

        def lose(is_lost):
            (gpu,) = pynvml.nvmlLib.gpus
            lost = pynvml.NVML_ERROR_GPU_IS_LOST
            gpu.errors = {PROCESSES: lost, "nvmlDeviceGetMemoryInfo": lost}
            gpu.errors = gpu.errors if is_lost else {}

        @pytest.mark.max_vram("400MiB", metric="process")
        def test_before():
            torch.zeros(1, device="cuda")

        def test_lost():
            torch.zeros(1, device="cuda")
            lose(True)

        def test_after():
            lose(False)
            torch.zeros(1, device="cuda")
        """
    )
    result = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", "--gpu-report=json:report.json", "-v"
    )

    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        ["*unknown*unknown*::test_lost*", "process bytes unknown: *the card is lost*"]
    )
    for name, nbytes in (("before", 300 * MIB), ("lost", None), ("after", 300 * MIB)):
        call = _call(pytester.path / "report.json", f"test_{name}")
        assert nbytes == call["peak_process_bytes"], name
        assert (nbytes is None) == (call["peak_card_bytes"] is None)


def test_nothing_is_said_where_nobody_asks(pytester: pytest.Pytester) -> None:
    """A run without reports and such limits has no use for process bytes."""
    pytester.makeconftest(AS_REAL.format(ail="mismatch"))
    pytester.makepyfile(LIMITED.replace('metric="process"', 'metric="reserved"'))
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")

    result.assert_outcomes(passed=2, failed=1)
    assert "process bytes" not in result.stdout.str()
