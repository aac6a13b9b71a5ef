"""Injection rules: which allocations fail, how often, and from when on.

A rule reads ``phase[:key=value,…]``: ``load:nth=3``, ``forward:min=64MiB,persistent``,
``any:min=20MiB,times=2``. See ``parse_rule`` for the keys.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from pytest_gpumem.errors import RuleError, SizeError
from pytest_gpumem.sizes import format_size, parse_size

Phase = Literal["any", "load", "forward", "backward", "optimizer"]

PHASES: Final[tuple[str, ...]] = get_args(Phase)
_KEYS: Final = ("nth", "min", "max", "device", "times", "persistent")


@dataclass(frozen=True, slots=True)
class Request:
    """One request for device memory, as a rule sees it.

    Attributes:
        nbytes: Bytes asked for, before any rounding.
        device_index: The card asked.
        phase: What the program was doing: one of ``PHASES`` but ``"any"``, or
            ``"other"``.
    """

    nbytes: int
    device_index: int
    phase: str


@dataclass(frozen=True, slots=True)
class Rule:
    """Which allocations fail.

    Attributes:
        phase: Only requests of this phase count; ``"any"`` counts all.
        nth: The first counted request that fails, from 1.
        min_bytes: Only requests of at least so many bytes count.
        max_bytes: Only requests of at most so many bytes count; None means no bound.
        device_index: Only requests to this card count; None means all cards.
        times: How many counted requests fail, from the ``nth`` on; None means all
            of them (persistent).
    """

    phase: str = "any"
    nth: int = 1
    min_bytes: int = 0
    max_bytes: int | None = None
    device_index: int | None = None
    times: int | None = 1

    def counts(self, request: Request) -> bool:
        """Tell whether a request is one of those that the rule numbers."""
        return (
            self.phase in ("any", request.phase)
            and request.nbytes >= self.min_bytes
            and (self.max_bytes is None or request.nbytes <= self.max_bytes)
            and self.device_index in (None, request.device_index)
        )

    def __str__(self) -> str:
        parts = [f"nth={self.nth}"]
        if self.min_bytes:
            parts.append(f"min={self.min_bytes}")
        if self.max_bytes is not None:
            parts.append(f"max={self.max_bytes}")
        if self.device_index is not None:
            parts.append(f"device={self.device_index}")
        if self.times is None:
            parts.append("persistent")
        elif self.times != 1:
            parts.append(f"times={self.times}")
        return f"{self.phase}:{','.join(parts)}"

    def describe(self) -> str:
        """Return the rule as a sentence's end: "the 3rd allocation of a load …"."""
        size = f" of at least {format_size(self.min_bytes)}" if self.min_bytes else ""
        phase = "" if self.phase == "any" else f" in {self.phase}"
        often = {None: " and every later one", 1: ""}.get(
            self.times, f" and the next {(self.times or 1) - 1}"
        )
        return f"allocation number {self.nth}{size}{phase}{often}"


class Schedule:
    """A rule and how far it has got; asked once for every request.

    Thread-safe: a loader's worker threads share one count.

    Attributes:
        rule: The rule.
        num_counted: Requests that the rule has numbered so far.
        num_failed: Requests that it has refused so far.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule: Final = rule
        self.num_counted = 0
        self.num_failed = 0
        self._lock = threading.Lock()

    @property
    def is_spent(self) -> bool:
        """Whether the rule will refuse nothing more."""
        times = self.rule.times
        return times is not None and self.num_failed >= times

    def refuses(self, request: Request) -> bool:
        """Count a request and tell whether it is to fail."""
        if not self.rule.counts(request):
            return False
        with self._lock:
            self.num_counted += 1
            if self.num_counted < self.rule.nth or self.is_spent:
                return False
            self.num_failed += 1
            return True


def parse_rule(text: str) -> Rule:
    """Read a rule.

    Args:
        text: ``phase[:key[=value],…]``. Phases: any, load, forward, backward,
            optimizer. Keys: ``nth=N`` the first to fail (default 1), ``min=SIZE`` and
            ``max=SIZE`` bytes of the requests that count, ``device=INDEX``,
            ``times=N`` how many fail (default 1), ``persistent`` all from the nth on.

    Raises:
        RuleError: The text is no rule; the message points at the character.
    """
    phase, colon, rest = text.partition(":")
    if phase.strip() not in PHASES:
        raise _error(text, 0, f"{phase.strip()!r} is no phase", PHASES)
    rule = Rule(phase=phase.strip())
    if colon and not rest.strip():
        raise _error(text, len(text), "nothing follows the colon", _KEYS)
    position = len(phase) + 1
    seen: set[str] = set()
    for part in rest.split(",") if rest else []:
        key = part.partition("=")[0].strip()
        if key in seen:
            raise _error(text, position, f"{key!r} is given twice", _KEYS)
        seen.add(key)
        rule = _with_key(rule, part, text, position)
        position += len(part) + 1
    if {"times", "persistent"} <= seen:
        at = text.index("persistent")
        raise _error(text, at, "'times' and 'persistent' exclude each other", ())
    if rule.max_bytes is not None and rule.max_bytes < rule.min_bytes:
        raise _error(text, text.index("max"), "'max' is below 'min'", ())
    return rule


def _with_key(rule: Rule, part: str, text: str, position: int) -> Rule:
    key, equals, value = (piece.strip() for piece in part.partition("="))
    at = position + len(part) - len(part.lstrip())
    if key == "persistent" and not equals:
        return replace(rule, times=None)
    if key not in _KEYS or key == "persistent":
        reason = (
            "'persistent' takes no value" if key == "persistent" else f"no key {key!r}"
        )
        raise _error(text, at, reason, _KEYS)
    value_at = position + (part.index("=") + 1 if equals else len(part))
    if key in ("min", "max"):
        try:
            nbytes = parse_size(value)
        except SizeError as error:
            raise _error(text, value_at, str(error), ()) from None
        return (
            replace(rule, min_bytes=nbytes)
            if key == "min"
            else replace(rule, max_bytes=nbytes)
        )
    lowest = 0 if key == "device" else 1
    if not value.isascii() or not value.isdigit() or int(value) < lowest:
        reason = f"{key}={value!r} is no whole number from {lowest} on"
        raise _error(text, value_at, reason, ())
    field = "device_index" if key == "device" else key
    if field == "nth":
        return replace(rule, nth=int(value))
    if field == "times":
        return replace(rule, times=int(value))
    return replace(rule, device_index=int(value))


def _error(
    text: str, position: int, reason: str, accepted: tuple[str, ...]
) -> RuleError:
    hint = f"; accepted are {', '.join(accepted)}" if accepted else ""
    return RuleError(
        f"injection rule {text!r}: {reason}{hint}\n"
        f"  {text}\n  {' ' * position}^\n"
        "  a rule reads PHASE[:KEY=VALUE,...], for example load:nth=3 or "
        "any:min=64MiB,persistent",
        value=text,
        position=position,
    )
