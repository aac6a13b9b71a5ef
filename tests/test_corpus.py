"""Planted bugs: every broken fallback is caught, and no correct one accused."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from fallbacks import broken, correct

from pytest_gpumem import Verdict, sweep_ooms, vram_budget
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        yield
    broken.reset()


def test_the_corpus_is_as_large_as_it_should_be() -> None:
    """At least 15 broken fallbacks and 10 correct ones, every verdict among them."""
    verdicts = {case.verdict for case in broken.EXPECTED.values()}

    assert len(broken.EXPECTED) >= 15
    assert len(correct.ALL) >= 10
    assert set(Verdict) - {Verdict.RECOVERED} == verdicts


@pytest.mark.parametrize(
    "body", broken.EXPECTED, ids=[body.__name__ for body in broken.EXPECTED]
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
            points=12,
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


@pytest.mark.parametrize(
    "body", correct.ALL, ids=[body.__name__ for body in correct.ALL]
)
def test_a_correct_fallback_lets_other_errors_through(body: Callable[[], Any]) -> None:
    """The negative control: a device-side assertion is nobody's OOM."""
    report = sweep_ooms(body, points=6, flavours=["not-oom"])

    assert not report.failures


def test_fallbacks_that_know_other_texts_recover_from_them() -> None:
    """cuBLAS, the driver, cuDNN, NVML and the host run out of memory too."""
    flavours = ["legacy", "driver", "cublas", "cudnn", "nvml", "host"]
    for body in correct.KNOW_FLAVOURS:
        known = flavours if body is correct.knows_every_text else ["legacy", "cublas"]
        report = sweep_ooms(body, points=4, flavours=known)

        assert not report.failures
