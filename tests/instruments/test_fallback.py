"""check_fallback: the staircase, faults, leaks and who holds them."""

from __future__ import annotations

import gc
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from ways import WORKERS

from pytest_gpumem import check_fallback
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import RuleError, SizeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest_plugins = ["pytester"]

MIB = 2**20
KEPT: list[Any] = []


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("1GiB"):
        yield
    KEPT.clear()


def _new() -> nn.Module:
    """Return a model of 64 MiB in fp32."""
    return _filled(0.001)


def _filled(value: float) -> nn.Module:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4)))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def _ladder() -> nn.Module:
    """Load on the card, else in half precision, else on the host."""
    rungs: tuple[Callable[[nn.Module], nn.Module], ...] = (
        lambda model: model.cuda(),
        lambda model: model.half().cuda(),
        lambda model: model,
    )
    for convert in rungs:
        try:
            model = convert(_new())
        except torch.OutOfMemoryError:
            continue
        return model
    raise AssertionError("unreachable")


def _run(model: nn.Module) -> torch.Tensor:
    parameter = next(model.parameters())
    batch = torch.ones(2, 2048, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        output: torch.Tensor = model(batch)
    return output.float().cpu()


def test_the_staircase_says_which_budget_leads_where() -> None:
    """Each budget ends on the highest rung that fits it."""
    report = check_fallback(
        _ladder, run=_run, budgets=["200MiB", "60MiB", "16MiB"], control=None
    )
    report.check()

    assert (
        (None, "cuda:0 float32"),
        (200 * MIB, "cuda:0 float32"),
        (60 * MIB, "cuda:0 float16"),
        (16 * MIB, "cpu float32"),
    ) == report.staircase
    assert [0, 0, 1, 2, 1, 2] == [step.num_ooms for step in report.steps]
    assert "cuda:0 float16" in str(report)


def test_budgets_come_from_the_whole_cards_peak() -> None:
    """Without a list, shares of what the top rung reserves lead down to the host."""
    report = check_fallback(_ladder, control=None)
    rungs = [rung for _budget, rung in report.staircase]

    assert "cuda:0 float32" == rungs[0] == rungs[1]
    assert "cpu float32" == rungs[-1]
    assert sorted(rungs, key=rungs.index) == rungs


def test_an_expected_rung_is_checked() -> None:
    """expect= names a budget and part of the rung's text."""
    report = check_fallback(
        _ladder,
        budgets=[],
        faults=[],
        control=None,
        expect={"60MiB": "float16", "16MiB": "cuda"},
    )

    with pytest.raises(
        AssertionError, match=r"16 MiB: it ended in 'cpu float32', expected was 'cuda'"
    ) as caught:
        report.check()
    assert "60 MiB: it" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.usefixtures("thawed_heap")
def test_what_a_failed_attempt_leaves_is_named() -> None:
    """The bytes, and who holds them."""

    def load() -> nn.Module:
        model = _new()
        try:
            return model.cuda()
        except torch.OutOfMemoryError as error:
            KEPT.append(error)
        return _new()

    report = check_fallback(load, budgets=["40MiB"], faults=[], control=None)
    step = report.steps[1]

    assert "cpu float32" == step.rung
    assert step.left_bytes >= 32 * MIB
    assert "of a failed attempt stay on the card" in step.problems[0]
    assert any("'KEPT' of" in holder for holder in step.holders)
    with pytest.raises(AssertionError, match="a traceback, OutOfMemoryError"):
        report.check()


def test_a_holder_that_cannot_be_looked_at_spoils_no_verdict() -> None:
    """Its class may answer every question with an error."""

    class Hostile:
        def __init__(self, held: Any) -> None:
            self.held = held

        @property  # type: ignore[misc]  # hostile on purpose
        def __class__(self) -> Any:
            raise RuntimeError("no class")

    def load() -> nn.Module:
        model = nn.Linear(4, 4)
        try:
            return model.cuda()
        except torch.OutOfMemoryError:
            KEPT.append(Hostile(torch.ones(4, device="cuda")))
        return nn.Linear(4, 4)

    report = check_fallback(load, budgets=[], faults=["any:nth=1"], control=None)

    assert "of a failed attempt stay on the card" in report.steps[1].problems[0]
    assert report.steps[1].holders


def test_captured_log_records_are_no_fault_of_the_code(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Pytest keeps a logged exception, and with it the tensors; the step says so."""

    def load() -> nn.Module:
        model = _new()
        try:
            return model.cuda()
        except torch.OutOfMemoryError:
            logging.getLogger("app").exception("falling back")
        return _new()

    report = check_fallback(load, budgets=["40MiB"], faults=[], control=None)
    report.check()

    assert "falling back" in caplog.text
    assert "pytest's log capture, not the code" in report.steps[1].holders[0]


def test_a_reference_cycle_that_held_a_failed_attempt_is_named() -> None:
    """A collection frees it, but only after the fallback went without its bytes."""

    def load() -> nn.Module:
        model = _new()
        try:
            return model.cuda()
        except torch.OutOfMemoryError as error:
            failed = error
            assert failed is not None  # and so this frame is held by its own local
        return _new()

    gc.disable()
    try:
        report = check_fallback(load, budgets=["40MiB"], faults=[], control=None)
    finally:
        gc.enable()
    report.check()

    assert 0 == report.steps[1].left_bytes
    assert re.search(
        r"MiB \(.*a reference cycle, which only a collection frees: .*"
        r"local 'failed' of load \(test_fallback",
        "\n".join(report.steps[1].holders),
    )


def test_ooms_of_other_parts_of_cuda_are_counted() -> None:
    """The allocator does not know of them; the negative control is none."""
    report = check_fallback(
        _knows_the_driver, budgets=[], faults=["any:nth=1,flavour=driver"]
    )

    assert [0, 1, 0] == [step.num_ooms for step in report.steps]


def _knows_the_driver() -> nn.Module:
    try:
        return _new().cuda()
    except torch.AcceleratorError as error:
        if "out of memory" not in str(error):
            raise
    return _new()


def test_a_half_moved_model_is_found() -> None:
    """Weights on card and host without a map of devices."""

    def load() -> nn.Module:
        model = _new()
        try:
            model.cuda()
        except torch.OutOfMemoryError:
            pass
        return model

    report = check_fallback(load, budgets=["40MiB"], faults=[], control=None)

    assert "the model is half moved" in report.steps[1].problems[0]


def test_a_model_that_computes_something_else_is_found() -> None:
    """The output is held to the whole card's, within what the dtype explains."""

    def load() -> nn.Module:
        model = _new()
        try:
            return model.cuda()
        except torch.OutOfMemoryError:
            pass
        return _filled(0.0011)

    report = check_fallback(load, run=_run, budgets=["40MiB"], faults=[], control=None)

    assert report.steps[1].problems[0].startswith("the output differs by ")


def test_a_fault_that_is_not_survived_is_found() -> None:
    """A loader without a fallback fails at the first fault; a clean end passes."""
    report = check_fallback(lambda: _new().cuda(), budgets=[], control=None)
    transient, persistent = report.steps[1:]

    assert "raised OutOfMemoryError" == transient.rung == persistent.rung
    assert transient.problems[0].startswith("it did not recover: OutOfMemoryError")
    assert not persistent.problems


def test_an_error_that_is_no_oom_is_found() -> None:
    """A fallback that breaks is told from one that gives up."""

    def load() -> nn.Module:
        try:
            return _new().cuda()
        except torch.OutOfMemoryError:
            pass
        model: Any = _new()
        return model.to_cpu()  # type: ignore[no-any-return]  # there is no such method

    report = check_fallback(load, budgets=[], control=None)

    assert "is not an OOM: AttributeError" in report.steps[1].problems[0]


def test_an_error_that_is_no_oom_must_come_through_each_fault() -> None:
    """Whether it is the control or one of the faults: and a swallower is told so."""
    faults = ["any:nth=2,flavour=not-oom"]

    def swallow() -> nn.Module:
        try:
            return _new().cuda()
        except RuntimeError:
            return _new()

    good = check_fallback(_ladder, budgets=[], faults=faults)
    bad = check_fallback(swallow, budgets=[], faults=faults, control=None)

    good.check()
    assert [None, *faults, "any:nth=1,flavour=not-oom"] == [
        step.fault for step in good.steps
    ]
    assert ("an error that is not an OOM was swallowed",) == bad.steps[1].problems


def test_a_loader_that_returns_nothing_is_found() -> None:
    """Neither a model nor an error is a verdict of its own."""

    def load() -> nn.Module | None:
        try:
            return _new().cuda()
        except torch.OutOfMemoryError:
            return None

    report = check_fallback(load, budgets=[], control=None)

    assert "the loader returned no model and raised nothing" in report.steps[1].problems


@pytest.mark.parametrize(
    ("options", "error"),
    [({"budgets": ["much"]}, SizeError), ({"faults": ["any:now"]}, RuleError)],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception]
) -> None:
    """With the parsers' own errors."""
    with pytest.raises(error):
        check_fallback(_ladder, **options)


@pytest.mark.parametrize("workers", WORKERS)
def test_the_fixture_checks_and_shows_the_staircase(
    pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    """A section at the end has the table, for workers too."""
    pytester.makepyfile(
        """
        import torch
        from torch import nn

        def load():
            try:
                return nn.Linear(1024, 1024).cuda()
            except torch.OutOfMemoryError:
                pass
            return nn.Linear(1024, 1024)

        def test_it(fallback):
            report = fallback(load, budgets=["2MiB"], control=None)
            assert report.staircase[1][1] == "cpu float32"
        """
    )
    result = pytester.runpytest("-p", "no:cacheprovider", *workers)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*= fallbacks =*", "*2 MiB * cpu float32"])
