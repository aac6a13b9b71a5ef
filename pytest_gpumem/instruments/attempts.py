"""One run of a sweep's body, with a fault or without, and its verdict."""

from __future__ import annotations

import dis
import gc
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.devices import allocated_bytes
from pytest_gpumem.errors import SweepError
from pytest_gpumem.instruments.equality import difference
from pytest_gpumem.instruments.flavours import is_injected
from pytest_gpumem.instruments.frames import clear_exception
from pytest_gpumem.instruments.holders import blocks_on_cards, find_holders
from pytest_gpumem.instruments.injector import OomInjector
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.surroundings import (
    Defaults,
    RandomState,
    StartedThreads,
    num_ooms,
    settle,
)
from pytest_gpumem.instruments.watchdog import HangError, Watchdog
from pytest_gpumem.model.rules import NOT_OOM
from pytest_gpumem.model.sweeps import Outcome, Point, Verdict
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.model.rules import Rule

#: Leaks whose holders are looked for, one for each site and mode; each search walks the
#: whole heap several times.
_SEARCHES: Final = 8
#: Seconds that threads a run leaves behind are waited for: they would allocate in the
#: next one.
_PATIENCE_S: Final = 1.0
_RAISE: Final = dis.opmap["RAISE_VARARGS"]


class Attempt(NamedTuple):
    """What one run ended in.

    Attributes:
        portrait: Of its result; None if it raised.
        error: What it raised, in words; None if nothing.
        is_oom: Whether that was an OOM, or chained to one.
        is_wrong: Whether that was a broken assertion.
        hung: Whether it had to be ended.
        extra_ooms: Failed allocations beyond the injected ones.
        num_injected: Allocations that the fault refused.
        left_bytes: Bytes on the cards afterwards.
        logged_bytes: Bytes that only captured log records held.
        seconds: How long it took.
    """

    portrait: Any
    error: str | None
    is_oom: bool
    is_wrong: bool
    hung: bool
    extra_ooms: int
    num_injected: int
    left_bytes: int
    logged_bytes: int
    seconds: float


class Attempts:
    """Runs a body again and again from the same start.

    Args:
        body: The code under test.
        setup: Makes its arguments.
        same: Tells whether two portraits are the same; None means by value.
        device: The cards.
    """

    def __init__(
        self,
        body: Callable[..., Any],
        setup: Callable[[], Sequence[Any]],
        same: Callable[[Any, Any], bool] | None,
        device: Device,
    ) -> None:
        self._body = body
        self._setup = setup
        self._same = same
        self.device: Final = device
        self._random = RandomState()
        self._defaults = Defaults()
        self._reference: Attempt | None = None
        self._searched: set[tuple[str, str]] = set()
        #: What was on the cards before, however old.
        self._known = blocks_on_cards()

    def clean(self) -> Attempt:
        """Run without a fault; the last such run is the reference.

        Raises:
            SweepError: The body fails; its own error is the cause.
        """
        attempt = self._run(None, None)
        self._reference = attempt
        return attempt

    def judge(self, point: Point, rule: Rule, timeout_s: float) -> Outcome | None:
        """Run with a fault; None if it was never reached."""
        before = blocks_on_cards()
        attempt = self._run(rule, timeout_s)
        if not attempt.num_injected and not attempt.hung:
            return None
        verdict, detail = self._verdict(point, attempt)
        left = attempt.left_bytes - (self._reference or attempt).left_bytes
        holders: tuple[str, ...] = ()
        if left > 0:
            holders = self._holders(point, before)
            if verdict.passes(recover=False):
                verdict = Verdict.LEAK
        if attempt.logged_bytes > 0:
            note = (
                f"{format_size(attempt.logged_bytes)} were held by captured log records "
                "alone; that is pytest's log capture, not the code"
            )
            detail = f"{detail}\n{note}".strip()
        return Outcome(
            point,
            verdict,
            detail,
            max(left, 0),
            holders,
            attempt.seconds,
            attempt.num_injected,
        )

    def _holders(self, point: Point, before: set[int]) -> tuple[str, ...]:
        kind = (point.site, point.mode)
        if kind in self._searched or len(self._searched) >= _SEARCHES:
            return ()
        self._searched.add(kind)
        gc.unfreeze()
        try:
            found = find_holders(self.device, before | self._known)
            self._known = blocks_on_cards()
            return tuple(str(each) for each in found)
        finally:
            gc.freeze()

    def _verdict(self, point: Point, attempt: Attempt) -> tuple[Verdict, str]:
        error = attempt.error
        if error is None:
            return self._verdict_on_result(point, attempt)
        if attempt.hung:
            return Verdict.HANG, error
        if attempt.is_wrong:
            return Verdict.WRONG_RESULT, error
        if not attempt.is_oom:
            return Verdict.OTHER_ERROR, error
        if attempt.extra_ooms > 0 and point.flavour != NOT_OOM:
            return (
                Verdict.OVER_BUDGET,
                f"{attempt.extra_ooms} allocation(s) beyond the injected one found no "
                f"room: {error}",
            )
        return Verdict.CLEAN_OOM, error

    def _verdict_on_result(self, point: Point, attempt: Attempt) -> tuple[Verdict, str]:
        if point.flavour == NOT_OOM:
            return Verdict.SWALLOWED, "an error that is no OOM vanished"
        wrong = self._wrong(attempt)
        return (Verdict.WRONG_RESULT, wrong) if wrong else (Verdict.RECOVERED, "")

    def _wrong(self, attempt: Attempt) -> str | None:
        reference = self._reference
        assert reference is not None, "unreachable: clean runs come first"  # noqa: S101  # states why
        if self._same is None:
            return difference(reference.portrait, attempt.portrait)
        if self._same(reference.portrait, attempt.portrait):
            return None
        return "the result is not the same as without a fault"

    def _run(self, rule: Rule | None, timeout_s: float | None) -> Attempt:
        self._defaults.restore()
        arguments = self._setup()
        self._random.restore()
        device = self.device
        start_bytes, start_ooms = allocated_bytes(device), num_ooms(device)
        injector = OomInjector(*(() if rule is None else (rule,)), device=device)
        watchdog = Watchdog(timeout_s)
        picture, error, is_oom, is_wrong, hung = None, None, False, False, False
        threads = StartedThreads()
        started_s = time.perf_counter()
        try:
            with watchdog, injector:
                result = self._body(*arguments)
            picture = portrait(result)
            del result
        except HangError as caught:
            hung, error = True, f"{caught}\n{watchdog.stacks or ''}"
            clear_exception(caught)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as caught:  # the verdict is on whatever it is
            if rule is None and not isinstance(caught, Exception):
                raise  # a skip, or an interruption: the caller's own affair
            if rule is None:
                raise SweepError(
                    f"the code fails without any fault: {_words(caught)}"
                ) from caught
            error, is_oom = _words(caught), is_the_oom(caught)
            is_wrong = isinstance(caught, AssertionError)
        seconds = time.perf_counter() - started_s
        threads.wait(0.0 if hung else _PATIENCE_S)
        self._defaults.restore()
        del arguments
        extra = num_ooms(device) - start_ooms - injector.num_ooms
        left, logged = settle(device, start_bytes)
        return Attempt(
            picture,
            error,
            is_oom,
            is_wrong,
            hung,
            extra,
            injector.num_injected,
            left,
            logged,
            seconds,
        )


def _words(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__


def is_the_oom(error: BaseException) -> bool:
    """Tell whether an error is an OOM or the injected one, or raised from such a one."""
    return any(
        isinstance(each, torch.OutOfMemoryError) or is_injected(each)
        for each in chain_of(error)
    )


def chain_of(error: BaseException) -> list[BaseException]:
    """Return an error and those that it was raised from.

    That is its explicit cause, the members of a group, and the error that was being
    handled where the handler itself raises. An error that comes up inside a function
    that the handler calls is a new one: the handler failed.
    """
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or any(current is each for each in found):
            continue
        found.append(current)
        waiting.append(current.__cause__)
        waiting += getattr(current, "exceptions", ())
        if _is_raised_by_handler(current):
            waiting.append(current.__context__)
    return found


def _is_raised_by_handler(error: BaseException) -> bool:
    """Tell whether the frame that caught an error's context has a ``raise`` for it."""
    context = error.__context__
    if context is None or context.__traceback__ is None or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code.co_code
    return (
        last.tb_frame is context.__traceback__.tb_frame
        and code[last.tb_lasti] == _RAISE
    )
