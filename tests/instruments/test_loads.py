"""One small load after the other, and what each of its two judges says of it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
import torch
from torch import nn

from pytest_gpumem import (
    active_device,
    check_fallback,
    judge_load,
    vram_budget,
)
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments.fallback import _rung
from pytest_gpumem.instruments.loads import model_in
from pytest_gpumem.instruments.module_parts import Placement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20
OOM: Final = "any:nth=1"
FOR_GOOD: Final = "any:nth=1,persistent"
CONTROL: Final = "any:nth=1,flavour=not-oom"


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("1GiB"):
        yield
    gc.collect()


def _new(value: float = 1.0) -> nn.Module:
    model = nn.Linear(4, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def _run(model: nn.Module) -> torch.Tensor:
    weight = next(model.parameters())
    with torch.no_grad():
        output: torch.Tensor = model(torch.ones(1, 4).to(weight.device, weight.dtype))
    return output


with pytest.raises(RuntimeError) as _raised:
    _run(nn.Linear(3, 2))
#: What the installed torch says of a model of another width.
_MISFIT: Final = str(_raised.value)[:20]


def _fall_back(
    instead: Callable[[], Any], *, catches: type[Exception] = torch.OutOfMemoryError
) -> Callable[[], Any]:
    """Return a loader that ends in something else where the card has no room."""

    def load() -> Any:
        try:
            return _new().cuda()
        except catches:
            pass
        return instead()

    return load


def _fail() -> None:
    raise KeyError("batch")


def _without_gradients() -> nn.Module:
    torch.set_grad_enabled(False)
    return _new()


def _half_moved() -> nn.Module:
    return nn.Sequential(_new(), _new().cuda())


_plain: Final = _fall_back(_new)
_greedy: Final = _fall_back(_new, catches=RuntimeError)


class Case(NamedTuple):
    """A load, and how the problems begin that each judge sees.

    Attributes:
        load: The loader.
        fault: The rule in force.
        judged: What ``judge_load`` says; an error's class where that comes through.
        checked: What ``check_fallback`` says.
        run: Computes an output.
    """

    load: Callable[[], Any]
    fault: str
    judged: str | type[Exception] | None
    checked: str | None
    run: Callable[[Any], Any] | None = _run


_ended: Final = "the load ended in an OOM: CUDA out of memory."
_swallowed: Final = "an error that is not an OOM was swallowed"
CASES: Final = {
    "recovers": Case(_plain, OOM, None, None),
    "recovers each time": Case(_plain, FOR_GOOD, None, None),
    "lets the control through": Case(_plain, CONTROL, torch.AcceleratorError, None),
    "has no fallback": Case(
        lambda: _new().cuda(), OOM, _ended, "it did not recover: OutOfMemoryError: CUDA"
    ),
    "has none for good": Case(lambda: _new().cuda(), FOR_GOOD, _ended, None),
    "catches too much": Case(_greedy, CONTROL, _swallowed, _swallowed),
    "catches too much, unused": Case(
        _fall_back(_new, catches=RuntimeError),
        "any:nth=99,flavour=not-oom",
        None,
        None,
    ),
    "loses the control": Case(
        _fall_back(_fail, catches=RuntimeError),
        CONTROL,
        KeyError,
        "an error that is not an OOM was lost, and another raised: KeyError: 'batch'",
    ),
    "fails by itself": Case(
        _fall_back(_fail),
        OOM,
        KeyError,
        "it ended in an error that is not an OOM: KeyError: 'batch'",
    ),
    "fails by itself for good": Case(
        _fall_back(_fail),
        FOR_GOOD,
        KeyError,
        "it ended in an error that is not an OOM: KeyError: 'batch'",
    ),
    "another flavour": Case(
        lambda: _new().cuda(),
        "any:nth=1,flavour=nvml",
        "the load ended in an OOM: NVML_SUCCESS",
        "it did not recover: RuntimeError: NVML_SUCCESS",
    ),
    "gives nothing": Case(
        _fall_back(lambda: None),
        OOM,
        "the loader returned no model and raised nothing",
        "the loader returned no model and raised nothing",
    ),
    "gives no model": Case(
        _fall_back(lambda: "loaded"),
        OOM,
        "the loader returned no model and raised nothing",
        "the loader returned no model and raised nothing",
    ),
    "other weights": Case(
        _fall_back(lambda: _new(2.0)),
        OOM,
        "the output differs by 5,",
        "the output differs by 5,",
    ),
    "other weights, not run": Case(
        _fall_back(lambda: _new(2.0)), OOM, None, None, run=None
    ),
    "half precision": Case(_fall_back(lambda: _new().half()), OOM, None, None),
    "cannot be run": Case(
        _fall_back(lambda: nn.Linear(3, 2)),
        OOM,
        f"the loaded model cannot be run: RuntimeError: {_MISFIT}",
        f"the loaded model cannot be run: RuntimeError: {_MISFIT}",
    ),
    "half moved": Case(
        _fall_back(_half_moved),
        OOM,
        "the model is half moved: weights on cpu, cuda:0 and no device map (",
        "the model is half moved: weights on cpu, cuda:0 and no device map (",
        run=None,
    ),
    # A single load shows nothing of what each load does.
    "leaves gradients off": Case(
        _fall_back(_without_gradients),
        OOM,
        None,
        "it leaves torch changed: grad mode is False, and was True",
    ),
    "always leaves them off": Case(_without_gradients, OOM, None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_load_is_judged(name: str) -> None:
    """Nothing is wrong, or the one thing that is."""
    case = CASES[name]

    if isinstance(case.judged, type):
        with pytest.raises(case.judged):
            judge_load(case.load, run=case.run, rules=[case.fault])
        return
    verdict = judge_load(
        case.load,
        run=case.run,
        reference=None if case.run is None else _run(_new()),
        rules=[case.fault],
    )

    _holds(verdict.problems, case.judged)


@pytest.mark.parametrize("name", CASES)
def test_a_fallback_is_judged(name: str) -> None:
    """Nothing is wrong, or the one thing that is."""
    case = CASES[name]

    report = check_fallback(
        case.load, run=case.run, budgets=[], faults=[case.fault], control=None
    )

    first, second = report.steps
    assert first.problems == ()
    _holds(second.problems, case.checked)
    assert second.fault == second.cause == case.fault


def _holds(problems: tuple[str, ...], expected: str | None) -> None:
    """Assert that there is one problem, which begins as expected; or none."""
    assert [each[: len(expected or "")] for each in problems] == (
        [] if expected is None else [expected]
    )


@pytest.mark.parametrize(
    ("budget_bytes", "problems"),
    [
        (2 * MIB, ()),
        (2 * MIB - 1, ("its peak of 2 MiB reserved is over the budget of 2 MiB",)),
    ],
)
def test_a_load_that_lifts_its_cap_is_held_to_the_budget(
    budget_bytes: int, problems: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the budget it is right, one byte above it is not."""
    # As on a real card, where the program's own fraction replaces the cap.
    kind = type(active_device())
    monkeypatch.setattr(kind, "budget", lambda _device, _index: budget_bytes)

    judged = judge_load(_plain).problems
    checked = check_fallback(_plain, budgets=[], faults=[], control=None)

    assert problems == judged == checked.steps[0].problems


def test_what_was_on_the_card_is_not_over_the_budget() -> None:
    """A fixture may hold more than a step's budget: then nothing fits beside it."""
    held = torch.empty(20 * MIB, dtype=torch.uint8, device="cuda")
    with vram_budget("4MiB"):
        judged = judge_load(_plain)
    checked = check_fallback(_plain, budgets=["4MiB"], faults=[], control=None)

    assert () == judged.problems == checked.steps[1].problems
    assert "cpu float32" == checked.steps[1].rung
    assert held.is_cuda


def test_a_load_that_is_where_it_should_be_has_no_problem() -> None:
    """Devices and dtype are compared by value."""
    verdict = judge_load(
        lambda: _new().half().cuda(),
        expect_devices=["cuda:0"],
        expect_dtype=torch.float16,
    )

    assert verdict.problems == ()
    assert verdict.error is None
    assert verdict.placement is not None
    verdict.check()


@pytest.mark.parametrize(
    ("load", "problems"),
    [
        (_fall_back(_fail), ()),
        (_plain, ("a KeyError should have come through and did not",)),
        (
            lambda: _new().cuda(),
            ("a KeyError should have come through and did not",),
        ),
    ],
)
def test_an_error_can_be_expected(
    load: Callable[[], Any], problems: tuple[str, ...]
) -> None:
    """Neither a load that ends well is right then, nor one that ends in an OOM."""
    verdict = judge_load(load, rules=[OOM], expect_error=KeyError)

    assert verdict.problems == problems


def test_what_has_to_be_retried_is_counted() -> None:
    """Injected and real OOMs on the way."""
    verdict = judge_load(_plain, rules=[OOM])

    assert (verdict.num_injected, verdict.num_ooms) == (1, 1)
    assert verdict.left_bytes == 0


@pytest.mark.parametrize(
    ("places", "dtypes", "rung"),
    [
        ({"cpu": 1}, {torch.float32}, "cpu float32"),
        ({"cuda:0": 1, "meta": 1}, {torch.float16}, "cuda:0+offloaded float16"),
        (
            {"cuda:1": 1, "cuda:0": 1},
            {torch.float32, torch.bfloat16},
            "cuda:0+cuda:1 bfloat16,float32",
        ),
        ({}, set(), ""),
    ],
)
def test_a_rung_is_devices_and_dtypes(
    places: dict[str, int], dtypes: set[torch.dtype], rung: str
) -> None:
    """In an order of their own, so that a table can be compared."""
    assert _rung(Placement(places, frozenset(dtypes), None, 0)) == rung


def test_the_model_is_found_in_what_a_loader_returns() -> None:
    """Itself, an attribute, an entry of that name, else the first module."""
    model, other = _new(), _new()

    class Service:
        def __init__(self) -> None:
            self.model = model

    assert model_in(model) is model
    assert model_in(Service()) is model
    assert model_in({"other": other, "model": model}) is model
    assert model_in({"size": 1, "net": model, "other": other}) is model
    assert model_in(("name", model, other)) is model
    assert model_in([1, 2]) is None
    assert model_in(7) is None
