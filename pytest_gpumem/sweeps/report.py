"""The report of a sweep: its points, their verdicts, and the sites that it covered."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pytest_gpumem.records.record import SweptSite, Verdict
from pytest_gpumem.rules.rule import NOT_OOM

if TYPE_CHECKING:
    from pytest_gpumem.rules.rule import Rule

#: Which allocations fail at a point: only the Nth, or the Nth and all later ones.
MODES: Final = ("transient", "persistent")


def mode_of(rule: Rule) -> str:
    """Return the mode of a rule's fault, one of ``MODES``."""
    return "persistent" if rule.times is None else "transient"


@dataclass(frozen=True, slots=True)
class Point:
    """One fault of a sweep.

    Attributes:
        number: Which allocation fails, from 1 on.
        mode: One of ``MODES``.
        flavour: The error that is raised.
        rule: The injection rule, as text, with which the point can be run alone.
        site: The code that allocates, as text; empty if it is not known.
    """

    number: int
    mode: str
    flavour: str
    rule: str
    site: str = ""

    def __str__(self) -> str:
        where = f" at {self.site}" if self.site else ""
        return f"allocation {self.number} fails, {self.mode}, {self.flavour}{where}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one point.

    Attributes:
        point: The fault.
        verdict: How the run ended.
        detail: The reason, for people; may have several lines.
        left_bytes: Bytes on the cards afterwards that a clean run does not leave.
        holders: The holders of these bytes, one line each.
        seconds: How long the run took.
        num_injected: Allocations that the fault made fail.
    """

    point: Point
    verdict: Verdict
    detail: str = ""
    left_bytes: int = 0
    holders: tuple[str, ...] = ()
    seconds: float = 0.0
    num_injected: int = 0

    def passes(self, *, recover: bool) -> bool:
        """Tell whether the run ended well.

        Args:
            recover: Whether the code must recover from an OOM. An error that is not an
                OOM must always reach the caller.
        """
        return self.verdict.passes(recover=recover and self.point.flavour != NOT_OOM)


@dataclass(slots=True)
class SweepReport:
    """The results of a sweep.

    Attributes:
        name: The name of the swept code.
        recover: Whether the code had to recover.
        sites: The site of each allocation of a clean run, in order.
        outcomes: Every point that was run, or read from an interrupted sweep.
        num_resumed: The number of points that were read from an interrupted sweep.
    """

    name: str
    recover: bool
    sites: tuple[str, ...]
    outcomes: list[Outcome] = field(default_factory=list)
    num_resumed: int = 0

    @property
    def num_allocations(self) -> int:
        """The number of allocations of a clean run that the plan's rule counts."""
        return len(self.sites)

    @property
    def failures(self) -> list[Outcome]:
        """The points that did not end well."""
        return [each for each in self.outcomes if not each.passes(recover=self.recover)]

    @property
    def verdicts(self) -> Counter[Verdict]:
        """How many points ended in each verdict."""
        return Counter(each.verdict for each in self.outcomes)

    @property
    def seconds(self) -> float:
        """How long the points took together."""
        return sum(each.seconds for each in self.outcomes)

    def coverage(self) -> list[SweptSite]:
        """Return the coverage of each site, in the order of first allocation."""
        allocations = Counter(self.sites)
        verdicts: dict[str, Counter[Verdict]] = {site: Counter() for site in self.sites}
        for each in self.outcomes:
            verdicts.setdefault(each.point.site, Counter())[each.verdict] += 1
        return [
            SweptSite(site, allocations[site], found.total(), dict(found))
            for site, found in verdicts.items()
        ]

    def failures_by_site(self) -> dict[tuple[str, Verdict], list[Outcome]]:
        """Return the failures grouped by site and verdict, the first ones first."""
        groups: dict[tuple[str, Verdict], list[Outcome]] = {}
        for each in self.failures:
            groups.setdefault((each.point.site, each.verdict), []).append(each)
        return groups
