"""Judging loads: good ladders pass, broken ones are caught by the same assertions."""

from __future__ import annotations

import gc
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_gpumem import judge_load, vram_budget
from pytest_gpumem.cards import find_card
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments.module_parts import placement_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INPUTS = torch.linspace(-1, 1, 2 * 512).reshape(2, 512)


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    """A simulated card of 256 MiB."""
    with simulated_device(find_card("256MiB,cc=8.0")):
        yield
    gc.collect()


def _build() -> nn.Module:
    """Return a model of 48 MiB in fp32: weights of 1 MiB, segments of 20 MiB."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(48))).eval()


def _run(model: nn.Module) -> torch.Tensor:
    parameter = next(model.parameters())
    with torch.no_grad():
        result: torch.Tensor = model(INPUTS.to(parameter.device, parameter.dtype))
    return result


def _reference() -> torch.Tensor:
    return _run(_build())


def good_ladder() -> nn.Module:
    """Fall back to half precision, then to the host, outside the handler."""
    moves: list[Callable[[nn.Module], nn.Module]] = [
        lambda model: model.cuda(),
        lambda model: model.half().cuda(),
    ]
    for move in moves:
        model = _build()
        try:
            move(model)
        except torch.OutOfMemoryError:
            del model
        else:
            return model
        gc.collect()
        torch.cuda.empty_cache()
    return _build()


def retry_inside_except() -> nn.Module:
    """Retry while the handler still holds the first attempt."""
    model = _build()
    try:
        return model.cuda()
    except torch.OutOfMemoryError:
        try:
            return _build().half().cuda()
        except torch.OutOfMemoryError:
            return _build()


def half_moved() -> nn.Module:
    """Give back the very module whose move failed."""
    model = _build()
    try:
        model.cuda()
    except torch.OutOfMemoryError:
        pass
    return model


_kept: list[Any] = []


def keeps_the_first_attempt() -> nn.Module:
    """Keep the failed attempt in a list, as a log of errors would."""
    model = _build()
    try:
        return model.cuda()
    except torch.OutOfMemoryError as error:
        _kept.append(error)
    return _build()


def wrong_numbers() -> nn.Module:
    """Fall back to a model with other weights."""
    try:
        return _build().cuda()
    except torch.OutOfMemoryError:
        pass
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(48))).eval()


def swallows_everything() -> nn.Module:
    """Take any error for an OOM."""
    try:
        return _build().cuda()
    except Exception:  # noqa: BLE001  # the bug under test
        return _build()


def test_a_good_ladder_passes_on_every_rung() -> None:
    """fp32, fp16 and the host: right place, right numbers, nothing left."""
    reference = _reference()
    for budget, devices, dtype in (
        ("80MiB", ["cuda:0"], torch.float32),
        ("48MiB", ["cuda:0"], torch.float16),
        ("8MiB", ["cpu"], torch.float32),
    ):
        with vram_budget(budget):
            judge_load(
                good_ladder,
                run=_run,
                reference=reference,
                expect_devices=devices,
                expect_dtype=dtype,
            ).check()


@pytest.mark.parametrize("rule", ["load:nth=1", "load:nth=30", "load:nth=1,times=2"])
def test_a_good_ladder_passes_under_injection(rule: str) -> None:
    """An OOM at any point of the load leaves nothing behind."""
    verdict = judge_load(good_ladder, run=_run, reference=_reference(), rules=[rule])

    verdict.check()
    assert verdict.num_injected


def test_a_retry_inside_except_misses_its_rung() -> None:
    """With the first attempt still on the card, the second one does not fit."""
    with vram_budget("48MiB"):
        verdict = judge_load(
            retry_inside_except,
            run=_run,
            reference=_reference(),
            expect_devices=["cuda:0"],
        )

    assert "the weights are on cpu, expected cuda:0" in verdict.problems


def test_a_half_moved_module_is_seen() -> None:
    """Weights on two devices without a map are a problem by themselves."""
    verdict = judge_load(half_moved, rules=["load:nth=20"])

    with pytest.raises(AssertionError, match="half moved: weights on cpu, cuda:0 and"):
        verdict.check()


def test_what_a_failed_attempt_left_is_weighed() -> None:
    """Bytes that are not the model's own are a problem."""
    verdict = judge_load(keeps_the_first_attempt, rules=["load:nth=11"])
    _kept.clear()

    assert 5 * (2**20 + 2048) == verdict.left_bytes
    assert "5.01 MiB of a failed attempt stay on the card" in verdict.problems


def test_wrong_numbers_are_seen() -> None:
    """An output that the dtype does not explain is a problem."""
    verdict = judge_load(
        wrong_numbers, run=_run, reference=_reference(), rules=["load:nth=1"]
    )

    assert any("the output differs" in problem for problem in verdict.problems)


@pytest.mark.parametrize(
    ("load", "is_fine"), [(good_ladder, True), (swallows_everything, False)]
)
def test_other_errors_must_come_through(
    load: Callable[[], Any], *, is_fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in the model's own code is not taken for an OOM."""

    def broken(*_args: object, **_kwargs: object) -> None:
        raise TypeError("a bug of the user's")

    monkeypatch.setattr(nn.Module, "cuda", broken)

    verdict = judge_load(load, expect_error=TypeError)

    assert is_fine == (not verdict.problems)
    if not is_fine:
        assert "a TypeError should have come through and did not" in verdict.problems


def test_an_injected_error_that_is_no_oom_must_come_through() -> None:
    """A loader that takes it for an OOM is told so; from others it comes through."""
    rules = ["load:nth=1,flavour=not-oom"]

    verdict = judge_load(swallows_everything, rules=rules)

    assert ("an error that is not an OOM was swallowed",) == verdict.problems
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        judge_load(good_ladder, rules=rules)
    judge_load(good_ladder, rules=rules, expect_error=torch.AcceleratorError).check()


def test_a_model_that_cannot_be_run_is_a_problem() -> None:
    """Whatever it raises; the rest of the verdict stands."""
    verdict = judge_load(
        half_moved, run=_run, reference=_reference(), rules=["load:nth=20"]
    )

    half, broken = verdict.problems
    assert half.startswith("the model is half moved")
    assert broken.startswith(
        "the loaded model cannot be run: RuntimeError: Expected all"
    )


def test_holders_of_what_is_left_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """check() says who holds the bytes."""
    # A new list in a new module: this one is frozen, and a search finds no holder in it.
    loader = ModuleType("loader")
    monkeypatch.setitem(sys.modules, "loader", loader)
    monkeypatch.setattr(sys.modules[__name__], "_kept", [])
    vars(loader)["kept"] = _kept
    verdict = judge_load(keeps_the_first_attempt, rules=["load:nth=11"])
    _kept.clear()

    with pytest.raises(AssertionError, match="global 'kept' of loader"):
        verdict.check()


def test_an_oom_of_the_load_is_reported() -> None:
    """A loader without a fallback ends in the error's own text."""
    with vram_budget("8MiB"):
        verdict = judge_load(lambda: _build().cuda())

    assert verdict.model is None
    assert verdict.problems[0].startswith(
        "the load ended in an OOM: CUDA out of memory"
    )
    assert 0 == verdict.left_bytes


def test_an_unexpected_place_and_type_are_reported() -> None:
    """Expected devices and dtype are compared with what is there."""
    verdict = judge_load(
        lambda: _build().cuda(), expect_devices=["cpu"], expect_dtype=torch.float16
    )

    assert (
        "the weights are on cuda:0, expected cpu",
        "the weights are torch.float32, expected torch.float16",
    ) == verdict.problems


def test_a_placement_reads_well() -> None:
    """Bytes by device and dtypes, on one line."""
    text = str(placement_of(_build().half().cuda()))

    assert "24.05 MiB on cuda:0 (torch.float16)" == text


def test_a_placement_counts_the_parameters_that_have_a_size() -> None:
    """A lazy one gets its size with the first batch."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))

    assert 2 * 3 + 3 == placement_of(model).num_parameters
