"""Make chosen allocations fail."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from pytest_gpumem.instruments.phases import current_phase
from pytest_gpumem.model.rules import Request, Rule, Schedule, parse_rule

if TYPE_CHECKING:
    from types import TracebackType

    from pytest_gpumem.devices import Device


class OomInjector:
    """Refuse the allocations that rules choose, for a block of code.

    The error is the allocator's own, with the numbers of that moment: caches are
    flushed first, ``num_ooms`` counts it, observers see it. Every thread's
    allocations count.

    Args:
        rules: Rules, as text (see ``parse_rule``) or parsed.
        device: Where to refuse; None means the active device.

    Raises:
        RuleError: A text is no rule.
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
        self._needs_phase = any(rule.phase != "any" for rule in parsed)

    @property
    def num_injected(self) -> int:
        """How many allocations were refused so far."""
        return sum(schedule.num_failed for schedule in self.schedules)

    @property
    def num_counted(self) -> int:
        """How many allocations the rules have numbered so far."""
        return sum(schedule.num_counted for schedule in self.schedules)

    def arm(self, rule: str | Rule) -> Schedule:
        """Add a rule inside the block; it counts from now on.

        Raises:
            RuleError: The text is no rule.
        """
        schedule = Schedule(parse_rule(rule) if isinstance(rule, str) else rule)
        self._needs_phase = self._needs_phase or schedule.rule.phase != "any"
        self.schedules.append(schedule)
        return schedule

    def disarm(self) -> None:
        """Drop every rule; what was counted is forgotten."""
        self.schedules.clear()
        self._needs_phase = False

    def refuses(self, device_index: int, nbytes: int) -> bool:
        """Count a request of ``nbytes`` bytes and tell whether a rule refuses it."""
        if not self.schedules:
            return False
        phase = current_phase() if self._needs_phase else "other"
        request = Request(nbytes=nbytes, device_index=device_index, phase=phase)
        # Every rule counts every request: no short circuit.
        return sum(schedule.refuses(request) for schedule in self.schedules) > 0

    def __enter__(self) -> OomInjector:  # noqa: PYI034  # Self needs Python 3.11
        device = self._device
        if device is None:
            from pytest_gpumem.devices.active import active_device  # noqa: PLC0415  # torch only when used

            device = active_device()
        self._stack.enter_context(device.refusing(self.refuses))
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
