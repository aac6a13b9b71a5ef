"""What a sweep is to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_gpumem.errors import SweepError
from pytest_gpumem.model.rule_parser import parse_rule
from pytest_gpumem.model.rules import FLAVOURS, Rule
from pytest_gpumem.model.sweeps import MODES

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What a sweep does.

    Attributes:
        points: ``"all"`` allocations, the first of each of the ``"sites"``, or so many
            of them, spread evenly.
        modes: Which of ``"transient"`` and ``"persistent"``.
        flavours: Which real-world errors; ``"native"`` is the allocator's own.
        rule: Which allocations count, for example ``"load"`` or ``"any:min=1MiB"``.
        recover: Whether the code must recover; else a clean OOM is good too.
        timeout_s: Seconds until a run is judged a hang; None means 20 times the clean
            run's, at least 10.
        only: A rule that names one point, to run that alone.
        shard: ``(index, count)``: every count-th point, from the index-th on.

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
        if points not in ("all", "sites") and not counts:
            raise SweepError(
                f"points={points!r}; accepted are 'all', 'sites' or a number from 1 on"
            )
        if not self.modes or isinstance(self.modes, str):
            raise SweepError(
                f"modes={self.modes!r}; give a list, such as {list(MODES)}"
            )
        for mode in self.modes:
            if mode not in MODES:
                raise SweepError(f"mode {mode!r}; accepted are {', '.join(MODES)}")
        if not self.flavours or isinstance(self.flavours, str):
            raise SweepError(f"flavours={self.flavours!r}; give a list of flavours")
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise SweepError(f"timeout_s={self.timeout_s!r}; give seconds above 0")
        for flavour in self.flavours:
            if flavour not in FLAVOURS:
                raise SweepError(
                    f"flavour {flavour!r}; accepted are {', '.join(FLAVOURS)}"
                )
        self.base()
        if self.only is not None:
            parse_rule(self.only)

    def base(self) -> Rule:
        """Return the rule of a point but for its number.

        Raises:
            RuleError: It cannot be read.
            SweepError: It says which allocations fail, which is the sweep's to say.
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

    def rule_of(self, number: int, mode: str, flavour: str) -> Rule:
        """Return the rule of one point.

        Raises:
            RuleError: The plan's rule, or the flavour, makes no sense.
        """
        times = None if mode == "persistent" else 1
        return replace(self.base(), nth=number, times=times, flavour=flavour)
