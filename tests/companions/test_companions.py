"""Other plugins beside this one: every result is as without them.

Run by ``tox run -e companions``, which installs them; each is loaded alone, then all.
"""

from __future__ import annotations

import json
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SUITE = """
    import pytest
    import torch

    def allocate():
        return torch.zeros(2**18, device="cuda")

    @pytest.mark.max_vram("2MiB")
    def test_within_the_limit():
        allocate()

    @pytest.mark.max_vram("512KiB")
    def test_over_the_limit():
        allocate()

    @pytest.mark.gpu_budget("2MiB")
    def test_over_the_budget():
        torch.zeros(2**20, device="cuda")

    @pytest.mark.inject_oom("any:nth=2")
    def test_recovers_from_an_oom():
        allocate()
        with pytest.raises(torch.OutOfMemoryError):
            allocate()
        torch.zeros(2**19, device="cuda")

    @pytest.mark.parametrize("mib", [1, 3])
    def test_against_the_baseline(mib):
        torch.zeros(mib * 2**18, device="cuda")
"""
#: The first of the last two is as in the baseline, the second has grown.
BASELINE = {
    "test_it.py::test_against_the_baseline[1]": {"allocated": 2**20},
    "test_it.py::test_against_the_baseline[3]": {"allocated": 2**20},
}
ENVIRONMENT = "Tesla T4, simulated, torch {}"


class Companion(NamedTuple):
    """A plugin to be loaded.

    Attributes:
        distribution: What it is installed as.
        plugins: Its modules.
        options: Of the run.
        suite: Tests that use it, beside the common ones.
        outcomes: What becomes of these, by name.
    """

    distribution: str
    plugins: tuple[str, ...]
    options: tuple[str, ...] = ()
    suite: str = ""
    outcomes: dict[str, str] = {}  # noqa: RUF012  # never changed


COMPANIONS: Final = (
    Companion("pytest-xdist", ("xdist.plugin",), ("-n", "2")),
    Companion(
        "pytest-rerunfailures",
        ("pytest_rerunfailures",),
        ("--reruns=1",),
        """
        import pytest
        import torch

        calls = []

        @pytest.mark.flaky(reruns=1)
        @pytest.mark.max_vram("1MiB")
        def test_flaky():
            calls.append(1)
            torch.zeros(2 ** (20 - 2 * len(calls)), device="cuda")
        """,
        {"test_flaky": "passed"},
    ),
    Companion("pytest-randomly", ("pytest_randomly",), ("--randomly-seed=1",)),
    Companion(
        "pytest-torch",
        ("pytest_torch.plugin",),
        ("--torch-device=cuda",),
        """
        import pytest
        import torch

        KEPT = []

        @pytest.mark.max_vram("2MiB")
        def test_its_device(torch_device):
            assert torch.device(torch_device).type == "cuda"
            torch.zeros(2**18, device=torch_device)

        @pytest.mark.max_vram("512KiB")
        def test_its_device_over(torch_device):
            torch.zeros(2**18, device=torch_device)

        @pytest.mark.torch_max_memory(mb=2)
        def test_its_limit(torch_device):
            torch.zeros(2**18, device=torch_device)

        @pytest.mark.torch_max_memory(mb=0.5)
        def test_its_limit_over(torch_device):
            torch.zeros(2**18, device=torch_device)

        @pytest.mark.torch_memory_leak
        def test_its_leak(torch_device):
            KEPT.append(torch.zeros(2**18, device=torch_device))
        """,
        {
            "test_its_device[cuda]": "passed",
            "test_its_device_over[cuda]": "failed",
            "test_its_limit[cuda]": "passed",
            "test_its_limit_over[cuda]": "failed",
            "test_its_leak[cuda]": "failed",
        },
    ),
    Companion(
        "pytest-asyncio",
        ("pytest_asyncio.plugin",),
        ("-o", "asyncio_default_fixture_loop_scope=function"),
        """
        import asyncio
        import pytest
        import torch

        @pytest.mark.asyncio
        @pytest.mark.max_vram("1MiB")
        async def test_async():
            held = torch.zeros(2**18, device="cuda")
            await asyncio.sleep(0)

        @pytest.mark.asyncio
        @pytest.mark.max_vram("512KiB")
        async def test_async_over():
            held = torch.zeros(2**18, device="cuda")
            await asyncio.sleep(0)

        @pytest.mark.asyncio
        @pytest.mark.inject_oom("any:nth=1")
        async def test_async_oom():
            await asyncio.sleep(0)
            with pytest.raises(torch.OutOfMemoryError):
                torch.zeros(2**18, device="cuda")
        """,
        {
            "test_async": "passed",
            "test_async_over": "failed",
            "test_async_oom": "passed",
        },
    ),
    Companion("pytest-timeout", ("pytest_timeout",), ("--timeout=300",)),
    Companion(
        "pytest-timeout",
        ("pytest_timeout",),
        ("--timeout=300", "--timeout-method=thread"),
    ),
    Companion("pytest-cov", ("pytest_cov.plugin",), ("--cov=.", "--cov-branch")),
    Companion(
        "pytest-memray",
        ("pytest_memray.plugin",),
        ("--memray",),
        """
        import pytest
        import torch

        @pytest.mark.limit_memory("4GB")
        @pytest.mark.max_vram("512KiB")
        def test_both_limits():
            torch.zeros(2**18, device="cuda")
        """,
        {"test_both_limits": "failed"},
    ),
    Companion(
        "pytest-benchmark",
        ("pytest_benchmark.plugin",),
        ("--benchmark-max-time=0.05", "--benchmark-min-rounds=2"),
        """
        import pytest
        import torch

        def allocate():
            torch.zeros(2**18, device="cuda")

        @pytest.mark.max_vram("1MiB")
        def test_benchmark(benchmark):
            benchmark(allocate)

        @pytest.mark.max_vram("512KiB")
        def test_benchmark_over(benchmark):
            benchmark(allocate)
        """,
        {"test_benchmark": "passed", "test_benchmark_over": "failed"},
    ),
)


def _tests(folder: Path) -> dict[str, dict[str, Any]]:
    """Return a run's tests by name, without what no two runs share."""
    report = json.loads((folder / "r.json").read_text("utf-8"))
    return {
        each["nodeid"].partition("::")[2]: {**each, "seconds": 0, "peak_host_bytes": 0}
        for each in report["tests"]
    }


def _run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    (pytester.path / "r.json").unlink(missing_ok=True)
    return pytester.runpytest_subprocess(
        "-p",
        "no:cacheprovider",
        "--gpu-backend=simulated",
        "--gpu-card=T4",
        "--gpu-baseline=b.json",
        "--gpu-report=json:r.json",
        *options,
    )


@pytest.fixture
def alone(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, Any]]:
    """The common suite, and what becomes of it without any other plugin."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    version = ".".join(metadata.version("torch").split(".")[:2])
    baseline = {
        "format": "pytest-gpumem baseline",
        "version": 1,
        "peaks": {ENVIRONMENT.format(version): BASELINE},
    }
    (pytester.path / "b.json").write_text(json.dumps(baseline), "utf-8")
    pytester.makepyfile(test_it=SUITE)
    _run(pytester, "-p", "pytest_gpumem.plugin")
    tests = _tests(pytester.path)
    assert {
        "test_within_the_limit": "passed",
        "test_over_the_limit": "failed",
        "test_over_the_budget": "failed",
        "test_recovers_from_an_oom": "passed",
        "test_against_the_baseline[1]": "passed",
        "test_against_the_baseline[3]": "failed",
    } == {name: each["outcome"] for name, each in tests.items()}
    return tests


@pytest.mark.parametrize(
    "companion",
    COMPANIONS,
    ids=lambda each: " ".join([each.distribution, *each.options]),
)
def test_every_result_is_as_without_it(
    companion: Companion,
    alone: dict[str, dict[str, Any]],
    pytester: pytest.Pytester,
) -> None:
    """Outcomes, peaks, injected OOMs, timelines; also of tests that use it."""
    if companion.suite:
        pytester.makepyfile(test_own=companion.suite)
    plugins = [f"-p{name}" for name in ("pytest_gpumem.plugin", *companion.plugins)]

    done = _run(pytester, *plugins, *companion.options)

    tests = _tests(pytester.path)
    own = {name: tests.pop(name)["outcome"] for name in companion.outcomes}
    assert companion.outcomes == own
    assert alone == tests
    assert pytest.ExitCode.TESTS_FAILED == done.ret
    done.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_every_result_is_as_without_all_of_them(
    alone: dict[str, dict[str, Any]],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that are installed load by themselves, with workers, reruns and coverage."""
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")

    done = _run(
        pytester,
        *("-n", "2", "--reruns=1", "--timeout=300", "--cov=."),
        *("-o", "asyncio_default_fixture_loop_scope=function"),
    )

    assert alone == _tests(pytester.path)
    for each in COMPANIONS:
        name = each.distribution.removeprefix("pytest-")
        done.stdout.fnmatch_lines(
            [f"plugins:*{name}-{metadata.version(each.distribution)}*"]
        )
