"""Runs a piece of code under faults and a budget, and describes how it ended.

This module runs the code for sweeps, ``check_fallback`` and ``judge_load``. These judge
the result: each reads an ``Attempt`` and decides what is wrong.
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
from pytest_gpumem.devices.cuda_errors import INTERPRETER_FAILED
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

#: The most seconds to wait for threads that a run has left. They would allocate memory in
#: the next run.
_PATIENCE_S: Final = 1.0
_RAISE: Final = dis.opmap["RAISE_VARARGS"]


class Failure(NamedTuple):
    """The error of a run, in words, because the error itself would keep its frames alive.

    Attributes:
        kind: The error's class.
        text: The error's text.
        is_oom: Whether it is an OOM or the injected error, or was raised from one of them.
        is_hang: Whether the run took too long and was interrupted.
    """

    kind: type[BaseException]
    text: str
    is_oom: bool
    is_hang: bool = False

    def words(self, most: int) -> str:
        """Return class and text on one line; the text is cut to ``most`` characters."""
        name = self.kind.__name__
        return f"{name}: {self.text[:most]}" if self.text else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The result of one run.

    Attributes:
        result: What ``Trial.keep`` made of the returned object; None if the code raised.
        failure: The error of the code; None if it did not raise.
        output: A portrait of the object that ``Trial.then`` computed from the result, or
            None.
        output_failure: The error of ``Trial.then``; None if it did not raise.
        num_injected: The number of allocations that the rules made fail.
        num_ooms: The number of all failed allocations, also those that the allocator does
            not count.
        extra_ooms: The number of failed allocations that no rule made fail.
        left_bytes: Bytes that the run added to the cards and that the result does not
            own; negative if the run has freed bytes.
        logged_bytes: Bytes that only captured log records held.
        changed: The defaults of torch that the run left changed, in words.
        cycles: What reference cycles held until a garbage collection; empty unless
            ``Trial.names_cycles``.
        known: Addresses of blocks from before the run, and of blocks that the result
            owns.
        figures: The peaks of the whole attempt.
        budget_bytes: The card's budget during the run, or the bytes reserved before if
            these are more; None if there is no budget.
        seconds: The time of the run.
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

    Before each run random states and torch's defaults are restored, and caches are
    emptied. After each run threads that it left running are waited for.

    Attributes:
        body: The code under test.
        setup: Makes the body's arguments, before each run and without faults.
        keep: Returns the part of a result to keep; it must hold no further memory.
        owns: Returns the blocks that a kept result owns: bytes by address.
        then: Computes an output from a kept result, once the bytes left were measured.
        names_cycles: Whether to search for reference cycles.
        device: The device.
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
            rules: The rules that make allocations of the body fail.
            budget_bytes: The card's budget; None leaves it unchanged.
            timeout_s: Seconds after which the run is interrupted; None means never.
            catches: Tells whether an error is part of the verdict. Other errors, and
                interruptions by the user, reach the caller.
        """
        self._defaults.restore()
        device, index = self.device, self.device_index
        settle(device, 0)
        # Measured without the arguments, which are freed before the end is measured.
        start_bytes = allocated_bytes(device)
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
            # Bytes from before the run do not count against the budget.
            if in_force is not None:
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
                except Exception as error:  # noqa: BLE001  # every error is judged
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
        """Return the holders of the bytes that an attempt has left, one line each.

        Blocks at the addresses in ``also_known`` are from before the run and are left
        out.
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
        except BaseException as error:  # every error is judged
            if not catches(error):
                raise
            return None, failure_of(error)


def failure_of(error: BaseException) -> Failure:
    """Return a description of an error that does not refer to the error."""
    return Failure(type(error), str(error).strip(), is_the_oom(error))


def is_the_oom(error: BaseException) -> bool:
    """Tell whether an error is an OOM or the injected one, or was raised from one."""
    return any(is_an_oom(each) or is_injected(each) for each in _origins(error))


def is_an_oom(error: BaseException) -> bool:
    """Tell whether an error is torch's OOM, also as rewritten by TorchScript's interpreter.

    Source: ``InterpreterStateImpl::handleError`` of
    ``torch/csrc/jit/runtime/interpreter.cpp``: the new error is a RuntimeError, whose text
    ends with that of the operator's error.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error) if type(error) is RuntimeError else ""
    return text.startswith(INTERPRETER_FAILED) and "CUDA out of memory" in text


def _origins(error: BaseException) -> list[BaseException]:
    """Return an error and the errors that it was raised from.

    These are its explicit cause, the members of a group of errors, and its context if an
    ``except`` block itself raises the new error. If a function that the ``except`` block
    calls raises, the error is a new one, because the handler failed.
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
