"""Fixtures: one-line wrappers over the public context managers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.plugin.record_keeping import record_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pytest_gpumem.instruments.competing_process import Tenant
    from pytest_gpumem.instruments.fallback import FallbackReport
    from pytest_gpumem.instruments.injector import OomInjector
    from pytest_gpumem.instruments.recorder import PeakRecorder
    from pytest_gpumem.sweeps.report import SweepReport


def session_of(config: pytest.Config) -> Any:
    """Return the run."""
    return config.pluginmanager.get_plugin("gpumem-session")


@pytest.fixture(name="vram_budget")
def vram_budget(
    request: pytest.FixtureRequest,
) -> Callable[..., AbstractContextManager[int]]:
    """Cap a card for a block of the test, in a with statement."""
    session_of(request.config).require_device()
    from pytest_gpumem.instruments.budget import vram_budget as budget

    return budget


@pytest.fixture(name="competing_process")
def competing_process(
    request: pytest.FixtureRequest,
) -> Callable[..., AbstractContextManager[Tenant]]:
    """Let another process hold memory of a card, in a with statement."""
    session_of(request.config).require_device()
    from pytest_gpumem.instruments.competing_process import competing_process as compete

    return compete


@pytest.fixture(name="steady")
def steady(request: pytest.FixtureRequest) -> Callable[..., Iterator[int]]:
    """A loop that fails if its memory grows from step to step.

    ``for step in steady(steps=9, warmup=2):``; the arguments are those of
    ``pytest_gpumem.steady``.
    """
    session_of(request.config).require_device()
    from pytest_gpumem.instruments.steady import steady as steps

    return steps


@pytest.fixture(name="vram_recorder")
def vram_recorder(request: pytest.FixtureRequest) -> type[PeakRecorder]:
    """Record the peaks of a block of the test, in a with statement."""
    session_of(request.config).require_device()
    from pytest_gpumem.instruments.recorder import PeakRecorder

    return PeakRecorder


@pytest.fixture(name="oom_injector")
def oom_injector(request: pytest.FixtureRequest) -> Iterator[OomInjector]:
    """An injector for the test: ``oom_injector.arm("load:nth=3")``."""
    device = session_of(request.config).require_device()
    from pytest_gpumem.instruments.injector import OomInjector

    with OomInjector(device=device) as injector:
        yield injector


@pytest.fixture(name="oom_sweep")
def oom_sweep(request: pytest.FixtureRequest) -> Callable[..., SweepReport]:
    """Fail every allocation of a function in turn: ``oom_sweep(load, path)``.

    The arguments are those of ``pytest_gpumem.sweep_ooms``. The test fails if a run ends
    badly.
    """
    run = session_of(request.config)
    run.require_device()
    from pytest_gpumem.plugin.marks import MarkersByTest
    from pytest_gpumem.plugin.sweeps import Sweeps

    def sweep(body: Callable[..., Any], *arguments: Any, **options: Any) -> SweepReport:
        sweeps = Sweeps(run, MarkersByTest())
        options.setdefault("name", getattr(body, "__qualname__", repr(body)))
        report = sweeps.sweep(request.node, body, *arguments, options=options)
        sweeps.check(request.node, report)
        return report

    return sweep


@pytest.fixture(name="fallback")
def fallback(request: pytest.FixtureRequest) -> Callable[..., FallbackReport]:
    """Check a loader's fallback under budgets and faults: ``fallback(load)``.

    The arguments are those of ``pytest_gpumem.check_fallback``. The test fails if a step
    has a problem; the staircase is shown at the end of the run.
    """
    session_of(request.config).require_device()
    from pytest_gpumem.instruments.fallback import check_fallback

    def check(load: Callable[[], Any], **options: Any) -> FallbackReport:
        __tracebackhide__ = True
        report = check_fallback(load, **options)
        record_of(request.node).fallbacks.append(list(report.steps))
        report.check()
        return report

    return check
