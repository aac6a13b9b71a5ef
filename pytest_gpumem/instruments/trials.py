"""Runs a piece of code under faults and a budget, and describes how it ended.

Sweeps, ``check_fallback`` and ``judge_load`` are judges: each reads an attempt and decides
what is wrong with it. This module runs the code for all of them.
"""

from __future__ import annotations

import dis
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.devices import allocated_bytes
from pytest_gpumem.instruments.budget import vram_budget
from pytest_gpumem.instruments.flavours import is_injected
from pytest_gpumem.instruments.holders import blocks_on_cards, find_holders
from pytest_gpumem.instruments.injector import OomInjector
from pytest_gpumem.instruments.portraits import portrait
from pytest_gpumem.instruments.recorder import PeakRecorder
from pytest_gpumem.instruments.surroundings import (
    Defaults,
    RandomState,
    num_ooms,
    settle,
    wait_for_threads,
)
from pytest_gpumem.instruments.watchdog import HangError, Watchdog
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.records.memory_figures import MemoryFigures
    from pytest_gpumem.rules.rule import Rule

#: Seconds that threads a run leaves behind are waited for: they would allocate in the
#: next one.
_PATIENCE_S: Final = 1.0
_RAISE: Final = dis.opmap["RAISE_VARARGS"]


class Failure(NamedTuple):
    """A run's error, in words, because the error itself would keep its frames alive.

    Attributes:
        kind: Its class.
        text: Its own text.
        is_oom: Whether it is an OOM or the injected error, or was raised from such a one.
        is_hang: Whether the run had to be ended.
    """

    kind: type[BaseException]
    text: str
    is_oom: bool
    is_hang: bool = False

    def words(self, most: int) -> str:
        """Return class and text on one line, the text cut."""
        name = self.kind.__name__
        return f"{name}: {self.text[:most]}" if self.text else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The result of one run.

    Attributes:
        result: What it returned, as ``Trial.keep`` has it; None if it raised.
        failure: What it raised; None if nothing.
        output: A portrait of what ``Trial.then`` made of the result; else None.
        output_failure: What that raised.
        num_injected: Allocations that the rules refused.
        num_ooms: Allocations that failed, those that the allocator counts and others.
        extra_ooms: Those of them that no rule refused.
        left_bytes: Bytes on the cards afterwards that were not there before, and that
            the result does not own; negative where the run has freed some.
        logged_bytes: Bytes that only captured log records held.
        changed: What of torch's defaults it left changed, in words.
        cycles: What reference cycles held until a collection, where that was asked.
        known: Addresses of blocks that are not what a failed attempt has left.
        figures: Peaks, of everything.
        budget_bytes: The card's budget in force, or what was reserved before where that
            is more; None without one.
        seconds: How long it took.
    """

    result: Any
    failure: Failure | None
    output: Any
    output_failure: Failure | None
    num_injected: int
    num_ooms: int
    extra_ooms: int
    left_bytes: int
    logged_bytes: int
    changed: frozenset[str]
    cycles: tuple[str, ...]
    known: frozenset[int]
    figures: MemoryFigures
    budget_bytes: int | None
    seconds: float

    @property
    def note(self) -> str:
        """The bytes that captured log records held, in words; empty if none."""
        if self.logged_bytes <= 0:
            return ""
        return (
            f"{format_size(self.logged_bytes)} were held by captured log records alone; "
            "that is pytest's log capture, not the code"
        )


@dataclass(kw_only=True)
class Trial:
    """Runs code again and again from the same start.

    Random states and torch's defaults are put back before each run, and caches emptied;
    threads that a run leaves at work are waited for.

    Attributes:
        body: The code under test.
        setup: Makes its arguments, before each run and without faults.
        keep: What of a result is kept; whatever it is must hold no memory of its own.
        owns: Returns the blocks that a kept result owns, with their bytes by address.
        then: Computes something from a kept result, once what is left was weighed.
        names_cycles: Whether reference cycles are looked for.
        device: The cards.
        device_index: The card of budgets and peaks.
    """

    body: Callable[..., Any]
    setup: Callable[[], Sequence[Any]] = tuple
    keep: Callable[[Any], Any] = field(default=lambda result: result)
    owns: Callable[[Any], Mapping[int, int]] = field(default=lambda _result: {})
    then: Callable[[Any], Any] | None = None
    names_cycles: bool = False
    device: Device
    device_index: int = 0

    def __post_init__(self) -> None:
        self._random = RandomState()
        self._defaults = Defaults()

    def run(
        self,
        *rules: str | Rule,
        budget_bytes: int | None = None,
        timeout_s: float | None = None,
        catches: Callable[[BaseException], bool] = lambda _error: True,
    ) -> Attempt:
        """Run once.

        Args:
            rules: Which of the body's allocations fail.
            budget_bytes: What the card may hold; None leaves that as it is.
            timeout_s: Seconds after which the run is ended; None never does.
            catches: Tells which errors are part of the verdict. Others come through, as
                does an interruption.
        """
        self._defaults.restore()
        device, index = self.device, self.device_index
        settle(device, 0)
        start_bytes = allocated_bytes(device)  # the arguments go before it is weighed
        arguments = self.setup()
        self._random.restore()
        known = frozenset(blocks_on_cards())
        start_ooms = num_ooms(device)
        injector = OomInjector(*rules, device=device)
        output, output_failure = None, None
        cycles: tuple[str, ...] = ()
        with ExitStack() as stack:
            stack.callback(self._defaults.restore)
            if budget_bytes is not None:
                budget = vram_budget(budget_bytes, device_index=index, device=device)
                stack.enter_context(budget)
            in_force = device.budget(index)
            if in_force is not None:  # bytes from before are not those of the body
                stats = device.memory_stats(index)
                in_force = max(in_force, stats["reserved_bytes.all.current"])
            recorder = PeakRecorder(device_index=index, device=device)
            stack.enter_context(recorder)
            threads, started_s = set(threading.enumerate()), time.perf_counter()
            result, failure = self._attempt(injector, arguments, timeout_s, catches)
            seconds = time.perf_counter() - started_s
            is_hang = failure is not None and failure.is_hang
            wait_for_threads(threads, 0.0 if is_hang else _PATIENCE_S)
            changed = self._defaults.changed()
            self._defaults.restore()
            del arguments
            own = self.owns(result) if failure is None else {}
            known |= own.keys()
            base = start_bytes + sum(own.values())
            if self.names_cycles and allocated_bytes(device) > base:
                cycles = find_holders(device, known, only_cycles=True)
            left, logged = settle(device, base)
            if failure is None and self.then is not None:
                try:
                    output = portrait(self.then(result))
                except Exception as error:  # noqa: BLE001  # the verdict is on whatever it is
                    output_failure = failure_of(error)
        total = num_ooms(device) - start_ooms
        return Attempt(
            result=result,
            failure=failure,
            output=output,
            output_failure=output_failure,
            num_injected=injector.num_injected,
            num_ooms=total + injector.num_uncounted_ooms,
            extra_ooms=total - injector.num_ooms,
            left_bytes=left,
            logged_bytes=logged,
            changed=changed,
            cycles=cycles,
            known=known,
            figures=recorder.figures,
            budget_bytes=in_force,
            seconds=seconds,
        )

    def holders(
        self, attempt: Attempt, *, also_known: Collection[int] = ()
    ) -> tuple[str, ...]:
        """Return what holds the bytes that an attempt has left, a line each.

        Blocks at the addresses that are known also were there before.
        """
        return find_holders(self.device, attempt.known.union(also_known))

    def _attempt(
        self,
        injector: OomInjector,
        arguments: Sequence[Any],
        timeout_s: float | None,
        catches: Callable[[BaseException], bool],
    ) -> tuple[Any, Failure | None]:
        watchdog = Watchdog(timeout_s)
        try:
            with injector, watchdog:
                result = self.body(*arguments)
            return self.keep(result), None
        except HangError as hang:
            stacks = watchdog.stacks or ""
            failure = failure_of(hang)
            return None, failure._replace(text=f"{hang}\n{stacks}", is_hang=True)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the verdict is on whatever it is
            if not catches(error):
                raise
            return None, failure_of(error)


def failure_of(error: BaseException) -> Failure:
    """Return a description of an error, without the error."""
    return Failure(type(error), str(error).strip(), is_the_oom(error))


def is_the_oom(error: BaseException) -> bool:
    """Tell whether an error is an OOM or the injected one, or raised from such a one."""
    return any(
        isinstance(each, torch.OutOfMemoryError) or is_injected(each)
        for each in _origins(error)
    )


def _origins(error: BaseException) -> list[BaseException]:
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
