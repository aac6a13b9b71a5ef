"""One run of a body: its error, its OOMs, what it leaves, what it changes."""

from __future__ import annotations

import builtins
import contextlib
import logging
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_gpumem import OomInjector, active_device, vram_budget
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments import trials
from pytest_gpumem.instruments.trials import Trial, failure_of, is_the_oom

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices import Device

MIB = 2**20
GIB = 2**30


def _runs_out() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")


def _fails() -> None:
    raise KeyError("missing")


def _raises_from_it() -> None:
    try:
        _runs_out()
    except torch.OutOfMemoryError as error:
        raise RuntimeError("no room") from error


def _raises_in_its_handler() -> None:
    try:
        _runs_out()
    except torch.OutOfMemoryError:
        raise RuntimeError("no room")  # noqa: B904  # as programs do


def _passes_on(raising: Callable[[], None]) -> None:
    raising()


def _raises_deep_inside() -> None:
    _passes_on(_raises_in_its_handler)


def _raises_twice() -> None:
    try:
        _raises_in_its_handler()
    except RuntimeError as error:
        raise ValueError("cannot load") from error


def _handler_fails_by_itself() -> None:
    try:
        _runs_out()
    except torch.OutOfMemoryError:
        int("batch")


def _handler_calls_what_fails() -> None:
    try:
        _runs_out()
    except torch.OutOfMemoryError:
        _fails()


def _raises_from_nothing_after_it() -> None:
    try:
        _runs_out()
    except torch.OutOfMemoryError:
        pass
    raise RuntimeError("later")


def _raises_from_another() -> None:
    try:
        _fails()
    except KeyError as error:
        raise RuntimeError("no room") from error


def _raises_in_another_handler() -> None:
    try:
        _fails()
    except KeyError:
        raise RuntimeError("no room")  # noqa: B904  # as programs do


def _holds_itself() -> None:
    error = RuntimeError("no room")
    error.__cause__ = error
    raise error


def _caught(raising: Callable[[], None]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever it is
        raising()
    return caught.value


@pytest.mark.parametrize(
    "raising",
    [
        _runs_out,
        _raises_from_it,
        _raises_in_its_handler,
        _raises_deep_inside,
        _raises_twice,
    ],
)
def test_what_is_raised_from_an_oom_is_one(raising: Callable[[], None]) -> None:
    """By its cause, or by a raise in the very handler, however deep that is."""
    assert is_the_oom(_caught(raising))


@pytest.mark.parametrize(
    "raising",
    [
        _fails,
        _handler_fails_by_itself,
        _handler_calls_what_fails,
        _raises_from_nothing_after_it,
        _raises_from_another,
        _raises_in_another_handler,
        _holds_itself,
    ],
)
def test_what_fails_by_itself_is_no_oom(raising: Callable[[], None]) -> None:
    """Not even in a handler of one."""
    assert not is_the_oom(_caught(raising))


@pytest.mark.skipif(
    not hasattr(builtins, "ExceptionGroup"), reason="there are no groups before 3.11"
)
def test_a_group_is_an_oom_if_a_member_is() -> None:
    """An error of several tasks."""
    group = builtins.ExceptionGroup

    oom = _caught(_raises_in_its_handler)
    assert is_the_oom(group("tasks", [KeyError(), oom]))
    assert is_the_oom(group("tasks", [oom, KeyError()]))
    assert not is_the_oom(group("tasks", [KeyError(), _caught(_fails)]))


def test_errors_that_were_not_raised_say_nothing_of_a_handler() -> None:
    """They have no frames; what they are chained to by hand is no cause."""
    fresh, raised = KeyError(), _caught(_fails)
    fresh.__context__ = _caught(_runs_out)
    raised.__context__ = torch.OutOfMemoryError("CUDA out of memory.")

    assert not is_the_oom(fresh)
    assert not is_the_oom(raised)


def test_an_injected_error_is_an_oom_whatever_its_class() -> None:
    """A flavour is raised as another class; the program's own error is none."""
    with (
        simulated_device("T4"),
        OomInjector("any:flavour=cublas"),
        pytest.raises(RuntimeError) as caught,  # the text is the flavour's
    ):
        torch.empty(1, device="cuda")

    assert is_the_oom(caught.value)
    assert not is_the_oom(RuntimeError(str(caught.value)))


def test_a_failure_says_class_and_text_on_one_line() -> None:
    """The text is cut; an error without one is its class alone."""
    failure = failure_of(_caught(_fails))

    assert failure.kind is KeyError
    assert not failure.is_oom
    assert "KeyError: 'mis" == failure.words(4)
    assert "KeyError" == failure_of(KeyError()).words(4)
    assert failure_of(_caught(_runs_out)).is_oom


# -- one run ------------------------------------------------------------------------------


def _take(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


def _twice(nbytes: int) -> None:
    """Ask twice, whatever comes of it."""
    for _ in range(2):
        with contextlib.suppress(Exception):
            _take(nbytes)


@pytest.fixture
def device() -> Iterator[Device]:
    """A simulated card of 1 GiB."""
    with simulated_device("1GiB"):
        yield active_device()


@pytest.mark.parametrize(
    ("rules", "nbytes", "injected", "ooms", "extra"),
    [
        ([], MIB, 0, 0, 0),
        ([], 2 * GIB, 0, 2, 2),
        (["any:nth=1"], MIB, 1, 1, 0),
        (["any:nth=1"], 2 * GIB, 1, 2, 1),
        (["any:nth=1,persistent"], MIB, 2, 2, 0),
        (["any:nth=1,flavour=cublas"], MIB, 1, 1, 0),
        (["any:nth=1,flavour=cublas"], 2 * GIB, 1, 2, 1),
        (["any:nth=1,flavour=not-oom"], MIB, 1, 0, 0),
        (["any:nth=1,flavour=not-oom"], 2 * GIB, 1, 1, 1),
        (["any:nth=1", "any:nth=2,flavour=driver"], MIB, 2, 2, 0),
    ],
)
def test_failed_allocations_are_told_apart(  # noqa: PLR0917  # a row of a table
    device: Device, rules: list[str], nbytes: int, injected: int, ooms: int, extra: int
) -> None:
    """Those of rules, those of the card, and errors that are no OOM; of this run."""
    trial = Trial(body=lambda: _twice(nbytes), device=device)

    trial.run(*rules)
    attempt = trial.run(*rules)

    found = (attempt.num_injected, attempt.num_ooms, attempt.extra_ooms)
    assert found == (injected, ooms, extra)


def test_arguments_are_made_anew_and_without_faults(device: Device) -> None:
    """They are the body's to lose, and nobody's once it has ended."""
    made = []

    def setup() -> tuple[torch.Tensor]:
        made.append(_take(4 * MIB))
        return (made.pop(),)

    trial = Trial(body=lambda tensor: tensor.nbytes, setup=setup, device=device)

    first, second = trial.run("any:nth=1"), trial.run("any:nth=1")

    for each in (first, second):
        assert (each.result, each.num_injected, each.left_bytes) == (4 * MIB, 0, 0)


def test_every_run_draws_the_same_numbers(device: Device) -> None:
    """On the host and on the card."""
    trial = Trial(
        body=lambda: (torch.rand(1).item(), torch.rand(1, device="cuda").item()),
        device=device,
    )

    assert trial.run().result == trial.run().result


class _Worker(threading.Thread):
    """Holds memory until somebody waits for it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._holds = threading.Event()
        self._is_waited_for = threading.Event()

    def start(self) -> None:
        super().start()
        self._holds.wait()

    def run(self) -> None:
        held = _take(2 * MIB)
        self._holds.set()
        self._is_waited_for.wait(10)
        del held

    def join(self, timeout: float | None = None) -> None:
        self._is_waited_for.set()
        super().join(timeout)


def test_a_thread_that_a_run_leaves_at_work_is_waited_for(device: Device) -> None:
    """What it holds when the run ends is no leak."""
    attempt = Trial(body=lambda: _Worker().start(), device=device).run()

    assert attempt.left_bytes == 0


def test_a_run_says_how_long_the_body_took(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweeps give later runs many times as long."""
    clock = SimpleNamespace(perf_counter=iter((10.0, 12.5)).__next__)
    monkeypatch.setattr(trials, "time", clock)

    assert Trial(body=_fails, device=device).run().seconds == 2.5


def test_what_a_result_owns_is_not_left(device: Device) -> None:
    """What it holds beside that is, and what was there before may go."""
    held = [_take(8 * MIB)]

    def body() -> list[torch.Tensor]:
        return [_take(2 * MIB), _take(4 * MIB)]

    def first(result: list[torch.Tensor]) -> dict[int, int]:
        return {result[0].untyped_storage().data_ptr(): 2 * MIB}

    assert Trial(body=body, device=device).run().left_bytes == 6 * MIB
    assert Trial(body=body, owns=first, device=device).run().left_bytes == 4 * MIB
    assert Trial(body=held.clear, device=device).run().left_bytes == -8 * MIB


def test_the_output_is_computed_once_what_is_left_was_weighed(device: Device) -> None:
    """What it takes is no leak; that it fails is part of the attempt."""
    kept = []

    def then(result: int) -> torch.Tensor:
        kept.append(_take(2 * MIB))
        return torch.full((result,), 7.0, device="cuda")

    attempt = Trial(body=lambda: 2, then=then, device=device).run()
    broken = Trial(body=lambda: 0, then=lambda each: 1 / each, device=device).run()
    failed = Trial(body=_fails, then=then, device=device).run()

    assert attempt.left_bytes == 0
    assert attempt.output.tolist() == [7.0, 7.0]
    assert attempt.output_failure is None
    assert broken.output is None
    assert broken.output_failure is not None
    assert broken.output_failure.kind is ZeroDivisionError
    assert (failed.output, failed.output_failure) == (None, None)
    assert len(kept) == 1


def test_a_run_has_the_budget_in_force(device: Device) -> None:
    """Its own, an outer one, or none; what was there before is no part of it."""
    trial = Trial(body=lambda: None, device=device)

    assert trial.run().budget_bytes is None
    assert trial.run(budget_bytes=8 * MIB).budget_bytes == 8 * MIB
    with vram_budget(6 * MIB):
        assert trial.run().budget_bytes == 6 * MIB
        assert trial.run(budget_bytes=8 * MIB).budget_bytes == 6 * MIB
    held = _take(20 * MIB)
    assert trial.run(budget_bytes=8 * MIB).budget_bytes == held.nbytes
    assert device.budget(0) is None


def test_errors_that_are_not_asked_for_come_through(device: Device) -> None:
    """With the budget and torch's defaults as they were."""

    def body() -> None:
        torch.set_default_dtype(torch.float64)
        raise KeyError("missing")

    with pytest.raises(KeyError):
        Trial(body=body, device=device).run(
            budget_bytes=MIB, catches=lambda error: isinstance(error, ValueError)
        )

    assert torch.get_default_dtype() is torch.float32
    assert device.budget(0) is None


@pytest.mark.parametrize("kind", [KeyError, SystemExit, GeneratorExit])
def test_any_error_may_be_part_of_the_verdict(
    device: Device, kind: type[BaseException]
) -> None:
    """Also one that ends the program."""

    def body() -> None:
        raise kind

    failure = Trial(body=body, device=device).run().failure

    assert failure is not None
    assert failure.kind is kind
    assert not failure.is_hang


def test_an_interruption_is_never_part_of_it(device: Device) -> None:
    """Whoever asked for it wants the run to end."""

    def body() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trial(body=body, device=device).run()


def test_a_run_without_an_end_is_ended_and_says_where_it_stood(device: Device) -> None:
    """Every thread's stack is in its text."""
    attempt = Trial(body=lambda: time.sleep(60), device=device).run(timeout_s=0.1)

    assert attempt.failure is not None
    assert attempt.failure.is_hang
    assert attempt.failure.text.startswith("no end after 0.1 s\nthread ")
    assert "time.sleep(60)" in attempt.failure.text


def test_a_default_that_is_left_changed_is_told(device: Device) -> None:
    """It is as before for the next run."""
    trial = Trial(body=lambda: torch.set_default_dtype(torch.float16), device=device)

    first, second = trial.run(), trial.run()

    assert first.changed == second.changed
    assert first.changed == {
        "the default dtype is torch.float16, and was torch.float32"
    }


def test_what_only_captured_log_records_hold_is_told_apart(device: Device) -> None:
    """It is pytest's log capture that holds it, whatever arguments were on the card."""

    def body() -> None:
        held = _take(4 * MIB)
        try:
            int(f"{held.nbytes} bytes")
        except ValueError:
            logging.getLogger("loader").exception("cannot load")

    attempt = Trial(body=body, device=device).run()
    beside = Trial(
        body=lambda _batch: body(), setup=lambda: (_take(8 * MIB),), device=device
    ).run()

    assert (attempt.left_bytes, attempt.logged_bytes) == (0, 4 * MIB)
    assert (beside.left_bytes, beside.logged_bytes) == (0, 12 * MIB)
    assert attempt.note.startswith("4 MiB were held by captured log records alone;")
    assert Trial(body=lambda: None, device=device).run().note == ""
