"""Programs do not notice that they are observed."""

from __future__ import annotations

import gc
import pickle
import random
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import programs
import pytest
import torch

from pytest_gpumem import OomInjector, PeakRecorder, active_device, sweep_ooms
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.guards import take_dropped
from pytest_gpumem.instruments.equality import compare_portraits
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.recorder import LimitWatch
from pytest_gpumem.instruments.timeline import Timeline
from pytest_gpumem.instruments.witness import OomWitness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: A rule that looks at everything and matches nothing.
NEVER = "forward:nth=1,site=*never*,thread=nobody,min=1TiB"


@pytest.fixture(scope="module", autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("256MiB"):
        yield


@contextmanager
def limits() -> Iterator[None]:
    """A limit that holds, one that is broken at once, peaks, and what describes them."""
    device = active_device()
    with ExitStack() as stack:
        witness = stack.enter_context(OomWitness(device))
        stack.enter_context(PeakRecorder())
        for limit in (1, 2**40):
            watch = LimitWatch(
                limit,
                metric="allocated",
                device_index=0,
                device=device,
                witness=witness,
            )
            stack.enter_context(watch)
        yield


@contextmanager
def timelines() -> Iterator[None]:
    """What a report shows: the timeline, and each OOM described."""
    device = active_device()
    with OomWitness(device), Timeline(device) as timeline:
        yield
    timeline.result()


@contextmanager
def a_rule() -> Iterator[None]:
    """A rule that asks for phase, thread and site each time, and never fails a request."""
    with OomInjector(NEVER, "any:nth=1,site=*never*") as injector:
        yield
    assert not injector.num_injected


@contextmanager
def a_sweep_before() -> Iterator[None]:
    """A sweep of something else, with its watchdog, its collections and its faults."""
    sweep_ooms(lambda: float(torch.ones(1, device="cuda")), points=1)
    yield


def run(
    program: Callable[[programs.Say], Any], observed: Any = ExitStack
) -> dict[str, Any]:
    """Run a program from a fixed start; return all that can be seen of it."""
    printed: list[str] = []

    def say(*words: object) -> None:
        printed.append(" ".join(map(str, words)))

    with observed():
        gc.collect()
        active_device().empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002  # what programs draw from
        torch.manual_seed(0)
        raised = None
        result = None
        gc.disable()  # whoever looks makes objects, which moves the next collection
        try:
            result = portrait(program(say))
        except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever it is
            raised = type(error), str(error)
        finally:
            gc.enable()
        stats = dict(torch.cuda.memory_stats())
        return {
            "result": result,
            "printed": printed,
            "raised": raised,
            "memory": stats,
            # As bytes: there are thousands of numbers in them.
            "random": [
                pickle.dumps(random.getstate()),
                pickle.dumps(np.random.get_state()),  # noqa: NPY002  # the state of the global generator
                torch.get_rng_state().numpy().tobytes(),
                torch.cuda.get_rng_state().numpy().tobytes(),
            ],
            "defaults": (torch.get_default_dtype(), torch.is_grad_enabled()),
        }


@pytest.mark.parametrize(
    "program", programs.PROGRAMS, ids=[each.__name__ for each in programs.PROGRAMS]
)
def test_a_program_is_the_same_whoever_looks(
    program: Callable[[programs.Say], Any],
) -> None:
    """What it returns, prints, raises and leaves, its numbers and its memory."""
    run(program)  # what is imported or built once only
    alone = run(program)
    for observed in (limits, timelines, a_rule, a_sweep_before):
        seen = run(program, observed)

        assert compare_portraits(alone, seen, where=observed.__name__).first is None
        assert not take_dropped()


def test_there_are_many_programs() -> None:
    """Each kind of thing that an observer might disturb."""
    assert len(programs.PROGRAMS) >= 40


def test_the_comparison_can_fail() -> None:
    """An observer that does something is seen."""

    @contextmanager
    def draws() -> Iterator[None]:
        def watch(*_told: int) -> None:
            torch.rand(1)

        with active_device().watching(watch):
            yield

    alone, seen = run(programs.loads_a_model), run(programs.loads_a_model, draws)
    found = compare_portraits(alone, seen).first

    assert found is not None
