"""What a run's error is to its judges: an OOM, raised from one, or another error."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

import pytest
import torch

from pytest_gpumem import OomInjector
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments.trials import failure_of, is_the_oom

if TYPE_CHECKING:
    from collections.abc import Callable


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

    assert is_the_oom(group("tasks", [KeyError(), _caught(_raises_in_its_handler)]))
    assert not is_the_oom(group("tasks", [KeyError(), _caught(_fails)]))


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
