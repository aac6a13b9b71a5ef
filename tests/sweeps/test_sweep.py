"""The sweep as a function: which points it runs, and how it starts each of them."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_gpumem import Outcome, SweepReport, Verdict, sweep_ooms, vram_budget
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import RuleError, SweepError
from pytest_gpumem.rules.rule import FLAVOURS, NOT_OOM
from pytest_gpumem.sweeps.judge import SweepJudge
from pytest_gpumem.sweeps.sweep_record import summary_of
from pytest_gpumem.sweeps.text import coverage_table, explain_failures, summarise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_gpumem.instruments.trials import Attempt

MIB = 2**20


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        yield


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


def _infer() -> torch.Tensor:
    """Use the card; no fallback."""
    output: torch.Tensor = _model().cuda()(torch.ones(4, 32).cuda())
    return output


def _recover() -> torch.Tensor:
    """Use the card, else the host."""
    try:
        return _infer().cpu()
    except torch.OutOfMemoryError:
        pass
    output: torch.Tensor = _model()(torch.ones(4, 32))
    return output


def _numbers(report: SweepReport, mode: str) -> list[int]:
    return [each.point.number for each in report.outcomes if each.point.mode == mode]


def test_every_allocation_fails_once_and_for_good() -> None:
    """N runs over all allocations, in both modes, and a clean OOM passes."""
    report = sweep_ooms(_infer)

    assert "_infer" == report.name
    assert 8 == report.num_allocations  # four parameters, a batch, three results
    assert list(range(1, 9)) == _numbers(report, "transient")
    assert list(range(1, 9)) == _numbers(report, "persistent")
    assert {Verdict.CLEAN_OOM: 16} == report.verdicts
    assert not report.failures


def test_recovery_can_be_demanded() -> None:
    """Then a clean OOM is a failure, and only a right result passes."""
    assert 16 == len(sweep_ooms(_infer, recover=True).failures)
    assert {Verdict.RECOVERED: 16} == sweep_ooms(_recover, recover=True).verdicts


def test_a_clean_oom_that_leaves_bytes_behind_is_a_leak() -> None:
    """Who holds them is looked for once for each site: it takes a while."""
    kept = []

    def body() -> None:
        held: list[torch.Tensor] = []
        try:
            held.extend(torch.zeros(MIB // 4, device="cuda") for _ in range(4))
        except torch.OutOfMemoryError:
            kept.append(held)
            raise

    alone, *leaks = sweep_ooms(body, modes=("transient",)).outcomes

    assert (Verdict.CLEAN_OOM, 0) == (alone.verdict, alone.left_bytes)
    assert [(Verdict.LEAK, n * MIB) for n in (1, 2, 3)] == [
        (each.verdict, each.left_bytes) for each in leaks
    ]
    assert [0, 1, 0, 0] == [len(each.holders) for each in (alone, *leaks)]
    assert "'kept'" in leaks[0].holders[0]


def test_the_end_is_an_unused_fault_and_no_success() -> None:
    """Code that recovers at once is swept to its last allocation all the same."""

    def body() -> float:
        for _attempt in range(3):
            try:
                return float(torch.ones(4, device="cuda").sum())
            except torch.OutOfMemoryError:
                continue
        return 4.0

    report = sweep_ooms(body, recover=True)

    assert 2 == report.num_allocations
    assert [1, 2] == _numbers(report, "transient") == _numbers(report, "persistent")
    assert {Verdict.RECOVERED: 4} == report.verdicts


def test_sites_are_swept_by_their_first_allocation() -> None:
    """points="sites" fails one allocation for each place that allocates."""
    report = sweep_ooms(_infer, points="sites", modes=["transient"])
    rows = report.coverage()

    assert len(set(report.sites)) == len(report.outcomes) < report.num_allocations
    assert report.num_allocations == sum(row.allocations for row in rows)
    assert all(1 == row.failed for row in rows)
    assert all("test_sweep.py" in row.site for row in rows)
    assert "test_sweep.py" in coverage_table(summary_of(report))


def test_a_number_of_points_is_spread_evenly() -> None:
    """The first and the last allocation are among them."""
    report = sweep_ooms(_infer, points=3, modes=["transient"])

    assert [1, 4, 8] == _numbers(report, "transient") or [1, 5, 8] == _numbers(
        report, "transient"
    )


def test_a_rule_says_which_allocations_count() -> None:
    """Only the forward's allocations fail; their numbers are their own."""
    report = sweep_ooms(_infer, rule="forward", modes=["transient"])

    assert 3 == report.num_allocations
    assert ["forward:nth=1", "forward:nth=2", "forward:nth=3"] == [
        each.point.rule for each in report.outcomes
    ]


def test_one_point_runs_alone() -> None:
    """A failing point's rule replays it."""
    (outcome,) = sweep_ooms(_infer, only="any:nth=5,persistent").outcomes

    assert (5, "persistent") == (outcome.point.number, outcome.point.mode)
    assert Verdict.CLEAN_OOM is outcome.verdict


def test_shards_are_the_whole_sweep_together() -> None:
    """Two workers run every point once."""
    shards = [sweep_ooms(_infer, shard=(index, 2)) for index in range(2)]
    points = sorted(str(each.point) for part in shards for each in part.outcomes)

    assert sorted(str(each.point) for each in sweep_ooms(_infer).outcomes) == points


def test_every_run_starts_from_the_same_random_state() -> None:
    """Numbers drawn by Python, on the host and on the card are the same each time."""
    drawn = []

    def body() -> None:
        drawn.append(
            (
                random.random(),  # noqa: S311  # what is tested
                torch.rand(1).item(),
                torch.rand(1, device="cuda").item(),
            )
        )
        torch.ones(4, device="cuda")

    sweep_ooms(body, modes=["transient"], rule="any:min=16")

    assert len(drawn) > 2
    assert 1 == len(set(drawn))


def test_what_a_run_leaves_behind_does_not_reach_the_next_one() -> None:
    """Torch's defaults are put back; threads still at work are waited for."""
    found = []
    pool = ThreadPoolExecutor(1)

    def body() -> None:
        idle = all(
            not thread.name.startswith("late") for thread in threading.enumerate()
        )
        found.append((torch.get_default_dtype(), torch.is_grad_enabled(), idle))
        pool.submit(int).result()
        torch.set_default_dtype(torch.float16)
        torch.set_grad_enabled(mode=False)
        threading.Thread(target=time.sleep, args=(0.3,), name="late").start()
        torch.ones(3, device="cuda")
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(mode=True)

    with pool:
        report = sweep_ooms(body)

    assert 2 == len(report.outcomes)
    assert {(torch.float32, True, True)} == set(found)


def test_a_factory_makes_the_arguments_anew() -> None:
    """What a run does to its arguments does not reach the next one."""
    made = []

    def setup() -> tuple[nn.Module]:
        made.append(_model())
        return (made[-1],)

    def body(model: nn.Module) -> Any:
        return model.cuda()(torch.ones(4, 32, device="cuda"))

    report = sweep_ooms(body, setup=setup, modes=["transient"])

    assert len(made) >= len(report.outcomes) + 2
    assert not report.failures


def test_arguments_are_given_or_made() -> None:
    """One of the two: nobody can say which should hold."""

    def body(nbytes: int) -> None:
        torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    assert 1 == sweep_ooms(body, MIB).num_allocations
    with pytest.raises(SweepError, match="not both"):
        sweep_ooms(body, MIB, setup=lambda: (MIB,))


def test_the_result_can_be_judged_by_the_caller() -> None:
    """same= takes the clean portrait and the run's."""

    def body() -> dict[str, Any]:
        try:
            return {"rung": "cuda", "sum": float(torch.ones(4, device="cuda").sum())}
        except torch.OutOfMemoryError:
            return {"rung": "cpu", "sum": 4.0}

    strict = sweep_ooms(body, recover=True)
    lenient = sweep_ooms(body, recover=True, same=lambda a, b: a["sum"] == b["sum"])

    assert {Verdict.WRONG_RESULT} == set(strict.verdicts)
    assert "the result['rung'] is 'cpu' instead of 'cuda'" == strict.failures[0].detail
    assert not lenient.failures


def test_progress_is_told() -> None:
    """After each point: how many are done, of how many, and the outcome."""
    told: list[tuple[int, int, Outcome]] = []

    report = sweep_ooms(_infer, progress=lambda *each: told.append(each))

    assert [(index, 16) for index in range(1, 17)] == [each[:2] for each in told]
    assert report.outcomes == [each[2] for each in told]


def test_an_interrupted_sweep_goes_on(tmp_path: Path) -> None:
    """Points that were done are not run again; a whole sweep leaves no file."""
    file = tmp_path / "state" / "sweep.jsonl"
    runs = []

    def body() -> torch.Tensor:
        runs.append(1)
        return _infer()

    def interrupt(done: int, _total: int, _outcome: Outcome) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_ooms(body, resume=file, progress=interrupt)
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"number": 6, "mo')  # what a killed process leaves
    runs.clear()
    report = sweep_ooms(body, resume=file)

    assert 5 == report.num_resumed
    assert 16 == len(report.outcomes)
    assert 2 + 11 + 2 == len(runs)  # prime, count, the rest, the unused faults
    assert not file.exists()
    assert "5 of them resumed" in summarise(summary_of(report))


def test_a_sweep_of_other_code_is_not_resumed(tmp_path: Path) -> None:
    """A file whose name, plan or number of allocations differs is begun anew."""
    file = tmp_path / "sweep.jsonl"

    def interrupt(*_told: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_ooms(_infer, resume=file, progress=interrupt)

    assert 0 == sweep_ooms(_infer, resume=file, modes=["transient"]).num_resumed


@pytest.mark.usefixtures("thawed_heap")
def test_heap_and_handlers_are_as_before() -> None:
    """A sweep thaws what it froze and takes its signal handler back."""
    import gc
    import signal

    before = gc.get_freeze_count(), signal.getsignal(signal.SIGUSR2)
    sweep_ooms(_infer, points=1)

    assert before == (gc.get_freeze_count(), signal.getsignal(signal.SIGUSR2))


@pytest.mark.parametrize(
    ("always", "verdict"), [(True, Verdict.RECOVERED), (False, Verdict.LEAK)]
)
def test_what_a_run_without_a_fault_changes_too_is_no_fault(
    verdict: Verdict, *, always: bool
) -> None:
    """A default that the fallback alone leaves changed is its leak."""

    def body() -> None:
        if always:
            torch.set_default_dtype(torch.float64)
        try:
            torch.empty(MIB, device="cuda")
        except torch.OutOfMemoryError:
            torch.set_default_dtype(torch.float64)

    report = sweep_ooms(body, modes=["transient"], recover=True)

    assert {verdict: 1} == report.verdicts


@pytest.mark.parametrize(
    ("raised", "is_chained", "verdict"),
    [
        (RuntimeError("no room"), True, Verdict.CLEAN_OOM),
        (KeyError("batch"), False, Verdict.OTHER_ERROR),
        (AssertionError("it is another"), False, Verdict.WRONG_RESULT),
        (AssertionError("it is another"), True, Verdict.WRONG_RESULT),
    ],
)
def test_what_a_fallback_raises_is_judged(
    raised: Exception, verdict: Verdict, *, is_chained: bool
) -> None:
    """What is raised from an OOM is one, but for an assertion; a handler may fail."""

    def fail() -> None:
        raise raised

    def body() -> None:
        try:
            torch.empty(MIB, device="cuda")
        except torch.OutOfMemoryError as error:
            if is_chained:
                raise raised from error
            fail()

    assert {verdict: 1} == sweep_ooms(body, modes=["transient"]).verdicts


def test_an_error_that_is_no_oom_must_come_through() -> None:
    """Code that catches every class of an OOM recovers from all others."""

    def body() -> None:
        with suppress(RuntimeError, MemoryError):
            torch.empty(MIB, device="cuda")

    report = sweep_ooms(body, modes=["transient"], recover=True, flavours=FLAVOURS)

    assert {
        flavour: Verdict.SWALLOWED if flavour == NOT_OOM else Verdict.RECOVERED
        for flavour in FLAVOURS
    } == {each.point.flavour: each.verdict for each in report.outcomes}


def test_a_sweep_goes_on_while_faults_are_met() -> None:
    """Later runs may allocate more often than the two without a fault."""
    counts = iter([1, 1])

    def body() -> None:
        for _ in range(next(counts, 2)):
            torch.empty(MIB, device="cuda")

    assert [1, 2] == _numbers(sweep_ooms(body, modes=["transient"]), "transient")


def test_a_point_that_is_not_reached_ends_no_sweep() -> None:
    """Code may allocate less often in one run, and as before in the next."""
    counts = iter([3, 3, 3, 1])

    def body() -> None:
        for _ in range(next(counts, 3)):
            torch.empty(MIB, device="cuda")

    report = sweep_ooms(body, modes=["transient"])

    assert [1, 3] == _numbers(report, "transient")


@pytest.mark.parametrize(
    ("clean_s", "timeout_s", "expected_s"),
    [(2.0, None, 40.0), (0.1, None, 10.0), (2.0, 3.0, 3.0)],
)
def test_a_run_may_take_many_times_as_long_as_the_clean_one(
    clean_s: float,
    timeout_s: float | None,
    expected_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fallback is slower, and no hang; the least is 10 s."""
    limits = []
    clean = SweepJudge.clean

    def slow(judge: SweepJudge) -> Attempt:
        return replace(clean(judge), seconds=clean_s)

    def judged(_judge: SweepJudge, _point: object, limit_s: float) -> None:
        limits.append(limit_s)

    monkeypatch.setattr(SweepJudge, "clean", slow)
    monkeypatch.setattr(SweepJudge, "judge", judged)
    sweep_ooms(_infer, points=1, modes=["transient"], timeout_s=timeout_s)

    assert [expected_s] == limits


@pytest.mark.parametrize("flavour", ["native", "cublas", "nvml", "xpu"])
def test_a_budget_that_the_fallback_breaks_is_told_apart(flavour: str) -> None:
    """The injected OOM was met; the fallback then wanted more than the budget."""

    def body() -> int:
        try:
            return torch.ones(8 * MIB, dtype=torch.uint8, device="cuda").numel()
        except RuntimeError:
            pass
        return torch.ones(64 * MIB, dtype=torch.uint8, device="cuda").numel()

    with vram_budget("32MiB"):
        report = sweep_ooms(body, modes=["transient"], flavours=[flavour])

    assert {Verdict.OVER_BUDGET: 1} == report.verdicts
    assert "beyond the injected one" in report.failures[0].detail


def test_code_that_fails_by_itself_is_no_code_to_sweep() -> None:
    """Its own error is the cause; nothing is judged."""

    def body() -> None:
        torch.ones(4, device="cuda")
        raise ValueError("broken anyway")

    with pytest.raises(
        SweepError, match="fails without any fault: ValueError"
    ) as caught:
        sweep_ooms(body)

    assert isinstance(caught.value.__cause__, ValueError)


def test_code_that_allocates_nothing_has_nothing_to_sweep() -> None:
    """The error says so; an empty sweep would prove nothing."""
    with pytest.raises(SweepError, match="makes no allocation"):
        sweep_ooms(lambda: torch.ones(4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"points": "some"},
            SweepError,
            "accepted are 'all', 'sites', 'ends' or a number",
        ),
        ({"points": 0}, SweepError, "points=0"),
        ({"modes": ["often"]}, SweepError, "'often'; accepted are transient"),
        ({"modes": "transient"}, SweepError, "give a list"),
        ({"modes": []}, SweepError, "give a list"),
        ({"flavours": "native"}, SweepError, "give a list"),
        ({"timeout_s": 0}, SweepError, "give seconds above 0"),
        ({"rule": "sometimes"}, RuleError, "'sometimes' is not a phase"),
        ({"only": "any:nth=0"}, RuleError, "nth"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Before anything runs."""
    with pytest.raises(error, match=message):
        sweep_ooms(pytest.fail, **options)


def test_failures_are_told_by_site_with_their_replay() -> None:
    """Three points of a group in full, the others by their replay alone."""
    report = sweep_ooms(_infer, recover=True)
    text = explain_failures(report, lambda rule: f"replay {rule}")

    assert text.startswith("_infer does not recover from 16 of 16 faults\n")
    assert "clean OOM at " in text
    assert "... and 5 more like these:" in text
    for outcome in report.outcomes:
        assert f"replay {outcome.point.rule}" in text
