"""The plan of a sweep: its points, and how their runs are judged."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pytest_gpumem.errors import SweepError
from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.rules.rule import FLAVOURS, Rule
from pytest_gpumem.sweeps.report import MODES, Point, mode_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: The texts that say which allocations a sweep makes fail.
POINT_WORDS: Final = ("all", "sites", "ends")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """The plan of a sweep.

    Attributes:
        points: Which allocations fail: ``"all"``; ``"sites"``, the first of each site;
            ``"ends"``, the first and the last of each site; or a number of allocations,
            spread evenly.
        modes: ``"transient"``, ``"persistent"`` or both.
        flavours: The errors that are raised; ``"native"`` is the allocator's own.
        rule: The allocations that count, for example ``"load"`` or ``"any:min=1MiB"``.
        recover: Whether the code must recover; if not, a clean OOM also passes.
        timeout_s: Seconds until a run is judged a hang; None means 20 times the clean
            run's time, and at least 10 seconds.
        only: A rule that names one point; only this point is run.
        shard: ``(index, count)``: every count-th point, starting at number ``index``.

    Raises:
        SweepError: A value makes no sense.
        RuleError: A rule cannot be read.
    """

    points: str | int = "all"
    modes: Sequence[str] = MODES
    flavours: Sequence[str] = ("native",)
    rule: str = "any"
    recover: bool = False
    timeout_s: float | None = None
    only: str | None = None
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        points = self.points
        counts = isinstance(points, int) and not isinstance(points, bool) and points > 0
        if points not in POINT_WORDS and not counts:
            raise SweepError(
                f"points={points!r}; accepted are {', '.join(map(repr, POINT_WORDS))} or a "
                "number from 1 on"
            )
        _check_words("mode", self.modes, MODES)
        _check_words("flavour", self.flavours, FLAVOURS)
        if self.timeout_s is not None and not _is_seconds(self.timeout_s):
            raise SweepError(f"timeout_s={self.timeout_s!r}; give seconds above 0")
        if not isinstance(self.recover, bool):
            raise SweepError(f"recover={self.recover!r}; accepted are True and False")
        if not _is_shard(self.shard):
            raise SweepError(
                f"shard={self.shard!r}; give an index from 0 on and a count above it"
            )
        for name in ("rule", "only"):
            text = getattr(self, name)
            if not isinstance(text, str) and (text is not None or name == "rule"):
                raise SweepError(f"{name}={text!r} is not a text such as 'load:nth=3'")
        self.base()
        if self.only is not None:
            parse_rule(self.only)

    def base(self) -> Rule:
        """Return the rule of a point, without its number.

        Raises:
            RuleError: The rule cannot be read.
            SweepError: The rule says which allocations fail, but the sweep chooses them.
        """
        rule = parse_rule(self.rule)
        if rule != replace(
            rule, nth=1, times=1, after_bytes=None, every=None, probability=None
        ):
            raise SweepError(
                f"rule={self.rule!r} says which allocations fail; a sweep fails each of "
                "those that count: leave phase, min, max, device, site and thread"
            )
        return rule

    @property
    def is_whole(self) -> bool:
        """Whether this sweep makes every allocation fail, without other workers."""
        return self.points == "all" and self.only is None and self.shard[0] == 0

    def points_of(self, sites: tuple[str, ...]) -> Iterator[Point]:
        """Yield the points, given the site of each allocation of a clean run."""
        if self.only is not None:
            rule = parse_rule(self.only)
            mode = mode_of(rule)
            site = sites[rule.nth - 1] if rule.nth <= len(sites) else ""
            yield Point(rule.nth, mode, rule.flavour, str(rule), site)
            return
        first, count = self.shard
        for mode in self.modes:
            for flavour in self.flavours:
                for number in self._numbers(sites)[first::count]:
                    yield self.point(number, mode, flavour, sites[number - 1])

    def _numbers(self, sites: tuple[str, ...]) -> list[int]:
        points, count = self.points, len(sites)
        if points in ("sites", "ends"):
            numbers = {sites.index(site) + 1 for site in sites}
            if points == "ends":
                # At its last allocation, most tensors of a site are already on the card.
                numbers |= {count - sites[::-1].index(site) for site in sites}
            return sorted(numbers)
        if isinstance(points, int) and points < count:
            return sorted(
                {1 + round(i * (count - 1) / max(points - 1, 1)) for i in range(points)}
            )
        return list(range(1, count + 1))

    def point(self, number: int, mode: str, flavour: str, site: str = "") -> Point:
        """Return one point, with its rule."""
        times = None if mode == "persistent" else 1
        rule = replace(self.base(), nth=number, times=times, flavour=flavour)
        return Point(number, mode, flavour, str(rule), site)


def _check_words(name: str, words: object, accepted: Sequence[str]) -> None:
    if not words or not isinstance(words, (list, tuple)):
        raise SweepError(f"{name}s={words!r}; give a list, such as {[accepted[0]]}")
    for word in words:
        if word not in accepted:
            raise SweepError(f"{name} {word!r}; accepted are {', '.join(accepted)}")


def _is_seconds(value: object) -> bool:
    # A longer time would overflow in the call that waits.
    return isinstance(value, (int, float)) and 0 < value <= threading.TIMEOUT_MAX


def _is_shard(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != len(("index", "count")):
        return False
    index, count = value
    return isinstance(index, int) and isinstance(count, int) and 0 <= index < count
