"""Planted bugs: every broken fallback is caught, and no correct one accused."""

from __future__ import annotations

import gc
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fallbacks import broken, correct
from fallbacks.parts import Service, batch, infer, new_model

from pytest_gpumem import (
    Verdict,
    check_fallback,
    judge_load,
    sweep_ooms,
    vram_budget,
)
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import SweepError
from pytest_gpumem.instruments.surroundings import _SETTINGS, Defaults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        gc.freeze()  # a sweep collects after each point; the device has many objects
        yield
        correct.forget()
    broken.reset()


def test_the_corpus_is_as_large_as_it_should_be() -> None:
    """At least 45 broken fallbacks and 25 correct ones, every verdict among them."""
    verdicts = {case.verdict for case in broken.EXPECTED.values()}

    assert len(broken.EXPECTED) >= 45
    assert len(correct.ALL) >= 25
    assert set(Verdict) - {Verdict.RECOVERED} == verdicts


#: What ends a hang comes again where it was lost: in a callback of a weak reference, which
#: torch's compiler has for tensors once it has been used.
_LOST = "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            body,
            id=body.__name__,
            marks=[pytest.mark.filterwarnings(_LOST)]
            if case.verdict is Verdict.HANG
            else [],
        )
        for body, case in broken.EXPECTED.items()
        # See the limits of ``Watchdog``.
        if sys.version_info >= (3, 11) or body is not broken.catches_everything_for_ever
    ],
)
def test_a_broken_fallback_is_caught(body: Callable[[], Any]) -> None:
    """With the verdict that names what is wrong with it."""
    case = broken.EXPECTED[body]
    # What does not hang has the time that a busy machine needs.
    timeout_s = 0.5 if case.verdict is Verdict.HANG else None
    with ExitStack() as stack:
        if case.budget is not None:
            stack.enter_context(vram_budget(case.budget))
        report = sweep_ooms(
            body,
            recover=True,
            flavours=case.flavours,
            timeout_s=timeout_s,
            points=case.points,
        )

    caught = [each for each in report.failures if each.verdict is case.verdict]
    assert caught
    assert any(case.says in each.detail for each in caught)


@pytest.mark.parametrize(
    "body", correct.ALL, ids=[body.__name__ for body in correct.ALL]
)
def test_a_correct_fallback_is_not_accused(body: Callable[[], Any]) -> None:
    """Each allocation fails, once and for good; those that can recover do."""
    report = sweep_ooms(body, recover=body in correct.RECOVER)

    assert not report.failures
    assert all(0 <= each.seconds < 60 for each in report.outcomes)


@pytest.mark.parametrize(
    "body", correct.ALL, ids=[body.__name__ for body in correct.ALL]
)
def test_a_correct_fallback_lets_other_errors_through(body: Callable[[], Any]) -> None:
    """The negative control: a device-side assertion is nobody's OOM."""
    report = sweep_ooms(body, points=3, flavours=["not-oom"])

    assert not report.failures


def test_fallbacks_that_know_other_texts_recover_from_them() -> None:
    """cuBLAS, the driver, cuDNN, NVML and the host run out of memory too."""
    flavours = ["legacy", "driver", "cublas", "cudnn", "nvml", "host"]
    for body in correct.KNOW_FLAVOURS:
        known = flavours if body is correct.knows_every_text else ["legacy", "cublas"]
        report = sweep_ooms(body, points=4, flavours=known)

        assert not report.failures


def _run(loaded: Any) -> torch.Tensor:
    """Return an output of which a part is masked, as scores that may not be chosen are."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model = model["model"] if isinstance(model, dict) else model
    service = model if isinstance(model, Service) else Service(model)
    with torch.no_grad():
        logits = service(batch()).cpu()
    logits[:, 4:] = -torch.inf
    return logits


def _problems(load: Callable[[], Any], rule: str) -> list[str]:
    """Return what both judges of loads say, each as one text."""
    report = check_fallback(load, run=_run, budgets=[], faults=[rule], control=None)
    broken.reset()
    correct.forget()
    reference = _run(correct.persistent_ladder())
    verdict = judge_load(load, run=_run, reference=reference, rules=[rule])
    return ["\n".join(report.steps[1].problems), "\n".join(verdict.problems)]


@pytest.mark.parametrize(
    "load", broken.LOADERS, ids=[load.__name__ for load in broken.LOADERS]
)
def test_a_broken_loader_is_caught_by_both_judges(load: Callable[[], Any]) -> None:
    """With the same words."""
    rule, says = broken.LOADERS[load]

    assert all(says in text for text in _problems(load, rule))


@pytest.mark.parametrize(
    ("load", "rule"),
    correct.LOADERS,
    ids=[f"{load.__name__}-{rule}" for load, rule in correct.LOADERS],
)
def test_a_correct_loader_is_accused_by_neither(
    load: Callable[[], Any], rule: str
) -> None:
    """Objects with a model, freed bytes, other texts, a rule that says "persistent"."""
    assert ["", ""] == _problems(load, rule)


def test_a_control_that_breaks_the_loader_is_no_pass() -> None:
    """The error that is not an OOM has to come through; another one is no proof of that."""
    bad = check_fallback(broken.breaks_on_the_way_down, budgets=[], faults=[])
    good = check_fallback(correct.persistent_ladder, budgets=[], faults=[])

    assert "was lost, and another raised: AttributeError" in bad.steps[1].problems[0]
    good.check()


def test_what_fails_for_good_may_reach_the_caller() -> None:
    """That is what its rule says by number of times, whatever words are in it."""
    report = check_fallback(
        broken.persistent_load,
        budgets=[],
        faults=["any:nth=1,persistent"],
        control=None,
    )

    report.check()


def _ends_the_program() -> Any:
    """As a script does."""
    try:
        return new_model().cuda()
    except torch.OutOfMemoryError:
        sys.exit(3)


def _leaves_half_precision() -> Any:
    """As a loader does that dies between two settings."""
    model = new_model()
    try:
        return model.cuda()
    except torch.OutOfMemoryError:
        torch.set_default_dtype(torch.float16)
    return new_model().float()


def _always_turns_gradients_off() -> Any:
    """As a server does."""
    torch.set_grad_enabled(False)
    return correct.persistent_ladder()


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (_ends_the_program, "it ended in an error that is not an OOM: SystemExit: 3"),
        (
            _leaves_half_precision,
            "it leaves torch changed: the default dtype is torch.float16, and was "
            "torch.float32",
        ),
        (_always_turns_gradients_off, ""),
    ],
)
def test_what_a_loader_does_to_the_program_is_told(
    load: Callable[[], Any], says: str
) -> None:
    """Beside what it does on the whole card."""
    report = check_fallback(load, budgets=[], faults=["any:nth=2"], control=None)

    assert says == "\n".join(report.steps[1].problems)
    assert not report.steps[0].problems
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "lazy",
    [
        lambda: (infer("cuda") for _ in range(2)),
        lambda: map(infer, ["cuda"]),
        lambda: zip(["cuda"], [1], strict=True),
    ],
    ids=["generator", "map", "zip"],
)
def test_a_result_that_has_done_nothing_yet_is_refused(lazy: Any) -> None:
    """There would be nothing to compare, and no fault inside it."""
    with pytest.raises(SweepError, match="which has computed nothing yet: return its"):
        sweep_ooms(lazy)


@pytest.mark.parametrize(
    "setting",
    [
        each
        for each in _SETTINGS
        if each.name
        not in {"the card", "the stream", "threads", "the set of global module hooks"}
    ],
    ids=lambda each: each.name,
)
def test_torchs_defaults_are_put_back(setting: Any) -> None:
    """Each of them, whatever else was set with it."""
    other: dict[Any, Any] = {
        torch.float32: torch.float64,
        torch.device("cpu"): torch.device("meta"),
        "highest": "high",
        "none": "ieee",
        "tf32": "ieee",
        0: 1,
    }
    before = [each.read() for each in _SETTINGS]
    defaults = Defaults()
    assert not defaults.changed()
    old = setting.read()
    new = not old if isinstance(old, bool) else other[old]

    setting.write(new)
    told = defaults.changed()
    defaults.restore()

    assert (f"{setting.name} is {new}, and was {old}" in told) is setting.counts
    assert before == [each.read() for each in _SETTINGS]
    assert not defaults.changed()


def test_defaults_are_put_back_where_torch_forbids_to_set_them() -> None:
    """Torch's own test utilities forbid it for the process, but in blocks."""
    frozen = torch.backends.flags_frozen.__globals__
    name = "__allow_nonbracketed_mutation_flag"
    old = torch.backends.cudnn.benchmark
    defaults = Defaults()
    torch.backends.cudnn.benchmark = not old
    try:
        frozen[name] = False
        defaults.restore()
        assert old is torch.backends.cudnn.benchmark
        assert torch.backends.flags_frozen()
    finally:
        frozen[name] = True
        torch.backends.cudnn.benchmark = old


def test_results_without_values_are_compared_by_shape() -> None:
    """Where a card keeps no values, there are no others to be had."""
    with simulated_device("T4", values="none"):
        assert not sweep_ooms(lambda: torch.ones(3, device="cuda")).failures

        def body() -> torch.Tensor:
            try:
                return torch.ones(3, device="cuda")
            except torch.OutOfMemoryError:
                return torch.ones(4)

        report = sweep_ooms(body, modes=("transient",), points=1)

    assert "has shape (4,) instead of (3,)" in report.failures[0].detail
