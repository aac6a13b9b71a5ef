"""Tests of the watchdog where Python lets no error out of a callback."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from typing import Any

import pytest

from pytest_gpumem.instruments.watchdog import HangError, Watchdog


class _Referent:
    """What a weak reference can point at."""


def _spin(_reference: object = None, *, seconds: float = 0.002) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def _lose_errors_for_ever(until: float) -> None:
    """Spend half the time in callbacks of weak references."""
    while time.monotonic() < until:
        referent = _Referent()
        reference = weakref.ref(referent, _spin)
        del referent
        assert reference() is None
        _spin()


def _in_thread(body: Any) -> None:
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()


@pytest.mark.parametrize("runs", [lambda body: body(), _in_thread])
def test_an_error_lost_in_a_callback_is_told_again_and_seen_by_nobody(
    monkeypatch: pytest.MonkeyPatch, runs: Any
) -> None:
    """No hook hears of it, and the block ends."""
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    before = sys.unraisablehook
    ends: list[BaseException] = []

    def _body() -> None:
        try:
            with Watchdog(0.05):
                _lose_errors_for_ever(time.monotonic() + 30)
        except HangError as error:
            ends.append(error)

    runs(_body)
    assert len(ends) == 1
    assert heard == []
    assert sys.unraisablehook is before


def test_a_slow_hook_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs when an error of the program's is lost runs to its end."""
    whole: list[bool] = []

    def _slow(_lost: Any) -> None:
        whole.append(False)
        _spin()
        whole[-1] = True

    def _fail(_reference: object) -> None:
        raise ValueError("the program's own")

    monkeypatch.setattr(sys, "unraisablehook", _slow)

    def _body() -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            referent = _Referent()
            reference = weakref.ref(referent, _fail)
            del referent
            assert reference() is None
            _spin(seconds=0.0002)  # a moment in which the watchdog may interrupt

    with pytest.raises(HangError), Watchdog(0.05):
        _body()
    assert whole
    assert all(whole)


def test_overlapping_blocks_of_threads_leave_the_hook_as_it_was() -> None:
    """The first to begin need not be the last to end."""
    before = sys.unraisablehook
    begun, may_end = threading.Event(), threading.Event()

    def _other() -> None:
        with Watchdog(30):
            begun.set()
            may_end.wait(30)

    with Watchdog(30):
        thread = threading.Thread(target=_other)
        thread.start()
        assert begun.wait(30)
    assert sys.unraisablehook != before
    may_end.set()
    thread.join()
    assert sys.unraisablehook is before
