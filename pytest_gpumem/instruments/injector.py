"""Makes chosen allocations fail."""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.guards import guarded
from pytest_gpumem.instruments.flavours import COUNTED, make_error
from pytest_gpumem.instruments.sites import caller_names, current_phase
from pytest_gpumem.instruments.witness import note_cause, tell_failed
from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.rules.rule import NOT_OOM, Request, Rule, Schedule

if TYPE_CHECKING:
    from collections.abc import Collection

    from pytest_gpumem.devices import Device


class OomInjector:
    """Make the allocations that rules choose fail, for a block of code.

    The error is the one that the allocator itself raises, with the card's figures at that
    moment: caches are flushed first, ``num_ooms`` counts the error, and observers are
    called. A rule's ``flavour`` chooses another error of real machines. Allocations of
    all threads count.

    Args:
        rules: Rules, as text (see ``parse_rule``) or parsed.
        device: The device on which allocations fail; None means the active device.

    Raises:
        RuleError: A text is not a rule.
        DeviceUnavailableError: There is no active device.

    Example::

        with OomInjector("load:nth=3") as injector:
            model = load()
        assert injector.num_injected == 1
    """

    def __init__(self, *rules: str | Rule, device: Device | None = None) -> None:
        parsed = [parse_rule(rule) if isinstance(rule, str) else rule for rule in rules]
        self.schedules = [Schedule(rule) for rule in parsed]
        self._device = device
        self._stack = ExitStack()
        self._is_entered = self._is_attached = False
        self._look()

    def _look(self) -> None:
        """Find out which facts about a request the rules need, so that only these are read.

        Without rules the injector detaches from the device, so that it costs no time.
        """
        rules = [schedule.rule for schedule in self.schedules]
        self._needs_phase = any(rule.phase != "any" for rule in rules)
        self._needs_site = any(rule.site is not None for rule in rules)
        self._needs_thread = any(rule.thread is not None for rule in rules)
        if not rules:
            self._stack.close()
        elif self._is_entered and not self._is_attached:
            device = self._require_device()
            self._stack.enter_context(device.failing(self.fails))
            self._stack.callback(setattr, self, "_is_attached", False)
            self._is_attached = True

    @property
    def num_injected(self) -> int:
        """How many allocations were made to fail so far."""
        return sum(schedule.num_failed for schedule in self.schedules)

    @property
    def num_ooms(self) -> int:
        """How many injected failures the allocator's ``num_ooms`` counts.

        See ``flavours``.
        """
        return self._num_failed(COUNTED)

    @property
    def num_uncounted_ooms(self) -> int:
        """How many injected OOMs come from other parts of CUDA; ``num_ooms`` lacks them."""
        return self.num_injected - self._num_failed({*COUNTED, NOT_OOM})

    def _num_failed(self, flavours: Collection[str]) -> int:
        mine = (each for each in self.schedules if each.rule.flavour in flavours)
        return sum(each.num_failed for each in mine)

    @property
    def num_counted(self) -> int:
        """How many allocations the rules have numbered so far."""
        return sum(schedule.num_counted for schedule in self.schedules)

    def arm(self, rule: str | Rule) -> Schedule:
        """Add a rule inside the block; it counts from now on.

        Raises:
            RuleError: The text is not a rule.
        """
        schedule = Schedule(parse_rule(rule) if isinstance(rule, str) else rule)
        self.schedules.append(schedule)
        self._look()
        return schedule

    def disarm(self) -> None:
        """Drop every rule and its counts."""
        self.schedules.clear()
        self._look()

    def fails(self, device_index: int, nbytes: int) -> bool:
        """Count a request of ``nbytes`` bytes and tell whether a rule fails it.

        Raises:
            RuntimeError: A rule fails it with a flavour that is not the device's own
                error.
        """
        request = Request(
            nbytes=nbytes,
            device_index=device_index,
            phase=current_phase() if self._needs_phase else "other",
            thread=_thread_name() if self._needs_thread else "main",
            names=guarded(caller_names, otherwise=()) if self._needs_site else (),
        )
        # Each rule must count each request, so all rules are asked, also after a match.
        striking = [each for each in self.schedules if each.fails(request)]
        if striking:
            note_cause(str(striking[0].rule))
        for schedule in striking:
            flavour = schedule.rule.flavour
            error = make_error(flavour, self._require_device(), device_index, nbytes)
            if error is not None:
                tell_failed(device_index, nbytes, is_oom=flavour != NOT_OOM)
                raise error
        return bool(striking)

    def refuses(self, device_index: int, nbytes: int) -> bool:
        """Call ``fails``; this is the former name of that method."""
        text = "OomInjector.refuses is now called OomInjector.fails"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return self.fails(device_index, nbytes)

    def _require_device(self) -> Device:
        if self._device is None:
            self._device = active_device()
        return self._device

    def __enter__(self) -> OomInjector:  # noqa: PYI034  # Self needs Python 3.11
        self._require_device()
        self._is_entered = True
        self._look()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_entered = False
        self._stack.close()


def _thread_name() -> str:
    thread = threading.current_thread()
    return "main" if thread is threading.main_thread() else thread.name
