"""The fixture ``competing_process``, as a run of pytest shows it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported
from ways import WAYS, each_way

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["pytester"]

GIB = 2**30


@pytest.fixture(params=each_way())
def run(
    request: pytest.FixtureRequest, pytester: pytest.Pytester
) -> Callable[..., pytest.RunResult]:
    """Run the tests of a text in each of the ways."""

    def run(code: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(code)
        way = WAYS[request.param]
        return pytester.runpytest("-p", "no:cacheprovider", *way, *options)

    return run


def test_a_tenant_lives_as_long_as_its_block(
    run: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    """It grows and leaves during a test, and is gone in the next one; so is a failure's."""
    result = run(
        """
        import threading

        import pytest
        import torch

        GIB = 2**30

        def free(card=0):
            return torch.cuda.mem_get_info(card)[0]

        def take(gib, card=0):
            return torch.empty(gib * GIB, dtype=torch.uint8, device=f"cuda:{card}")

        @pytest.fixture
        def crowd(competing_process):
            with competing_process("5GiB", device_index=1) as tenant:
                yield tenant

        def test_grows_while_the_test_works(competing_process):
            with competing_process("10GiB") as tenant:
                kept = take(4)
                with pytest.raises(torch.OutOfMemoryError, match="has 10.00 GiB"):
                    take(4)
                other = threading.Thread(target=tenant.leave)
                other.start()
                other.join()
                more = take(4)
                with pytest.raises(Exception, match="only 8 GiB .* are free"):
                    tenant.grow("9GiB")
                tenant.grow("8GiB")
                assert free() == 0
                assert kept.device == more.device

        def test_two_at_once(competing_process):
            assert free() == 16 * GIB
            with competing_process("10GiB") as one, competing_process("50%") as two:
                pass

        def test_fails_beside_one(competing_process):
            with competing_process("6GiB") as one, competing_process("25%") as two:
                assert free() == 6 * GIB and one.pid != two.pid
                kept = take(5)
                assert free() == 6 * GIB, "a test that fails beside tenants"

        def test_of_a_fixture(crowd):
            assert (free(0), free(1)) == (16 * GIB, 11 * GIB)
            crowd.grow("1GiB")
            take(10, card=1)

        @pytest.mark.inject_oom("any:nth=1")
        def test_beside_a_fault(crowd):
            with pytest.raises(torch.OutOfMemoryError, match="has 5.00 GiB"):
                take(1, card=1)
        """,
        "--gpu-card=16GiB,cc=8.0*2",
        "--gpu-values=none",
        "--gpu-report=json:report.json",
    )

    result.assert_outcomes(passed=3, failed=2)
    result.stdout.fnmatch_lines_random(
        [
            "*TenantError: a competing process that takes '50%' (* bytes) of cuda:0: "
            "only 6 GiB *",
            "*AssertionError: a test that fails beside tenants*",
        ]
    )
    report = json.loads((pytester.path / "report.json").read_text(encoding="utf-8"))
    cards = {
        (each["nodeid"].partition("::")[2], figures["device_index"]): figures
        for each in report["tests"]
        for figures in each["figures"]
        if figures["phase"] == "call"
    }
    fixture: dict[str, Any] = cards["test_of_a_fixture", 1]
    assert 10 * GIB == fixture["peak_process_bytes"]


def test_it_needs_a_card(run: Callable[..., pytest.RunResult]) -> None:
    """Where the plugin is off there is none to compete for."""
    result = run(
        """
        def test_it(competing_process):
            pass
        """,
        "--gpu-backend=off",
    )

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*this test needs a GPU, but the backend is off*"])
