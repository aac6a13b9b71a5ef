"""A sweep's figures without its points: what crosses processes and goes into reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_gpumem.records.record import Sweep, SweptSite
from pytest_gpumem.sweeps.report import SiteCoverage, SweepReport, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.records.record import Replay


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """How a sweep ended, in figures.

    Attributes:
        name: What was swept.
        sites: What was tried at each place that allocates.
        num_failures: Points that ended badly.
        num_resumed: Points that were read from an interrupted sweep.
        seconds: How long the points took together.
    """

    name: str
    sites: tuple[SiteCoverage, ...]
    num_failures: int
    num_resumed: int
    seconds: float

    @classmethod
    def of(cls, report: SweepReport) -> SweepSummary:
        """Sum a report up."""
        return cls(
            report.name,
            tuple(report.coverage()),
            len(report.failures),
            report.num_resumed,
            report.seconds,
        )

    @property
    def num_allocations(self) -> int:
        """Allocations of a clean run that count."""
        return sum(site.num_allocations for site in self.sites)

    @property
    def num_sites(self) -> int:
        """Places that allocate in a clean run."""
        return sum(site.num_allocations > 0 for site in self.sites)

    @property
    def num_points(self) -> int:
        """Faults that were tried."""
        return sum(site.num_failed for site in self.sites)

    @property
    def verdicts(self) -> Counter[Verdict]:
        """How many points ended in each verdict."""
        return sum((site.verdicts for site in self.sites), Counter())

    def joined(self, other: SweepSummary) -> SweepSummary:
        """Return this part of a sweep and another one as one.

        Each worker of pytest-xdist runs some points of the same sweep; the allocations
        that they counted are the same.
        """
        by_site = {site.site: site for site in self.sites}
        for site in other.sites:
            mine = by_site.get(site.site, SiteCoverage(site.site))
            by_site[site.site] = SiteCoverage(
                site.site,
                max(mine.num_allocations, site.num_allocations),
                mine.num_failed + site.num_failed,
                mine.verdicts + site.verdicts,
            )
        return SweepSummary(
            self.name,
            tuple(by_site.values()),
            self.num_failures + other.num_failures,
            self.num_resumed + other.num_resumed,
            self.seconds + other.seconds,
        )

    @staticmethod
    def whole(parts: Iterable[Sweep]) -> dict[tuple[str, str], SweepSummary]:
        """Return whole sweeps of parts from several workers, by test and name."""
        found: dict[tuple[str, str], SweepSummary] = {}
        for each in parts:
            part = SweepSummary.from_record(each)
            key = (each.nodeid, part.name)
            found[key] = found[key].joined(part) if key in found else part
        return found

    def to_record(self, nodeid: str, *, recover: bool, replays: list[Replay]) -> Sweep:
        """Return the summary as a test's record has it.

        Args:
            nodeid: The test that was swept.
            recover: Whether only recovery passes.
            replays: Commands for groups of points that ended badly.
        """
        sites = [
            SweptSite(
                site.site,
                site.num_allocations,
                site.num_failed,
                {verdict.value: count for verdict, count in site.verdicts.items()},
            )
            for site in self.sites
        ]
        return Sweep(
            nodeid,
            self.name,
            recover,
            self.num_points,
            self.num_failures,
            self.num_resumed,
            self.seconds,
            sites,
            replays,
        )

    @classmethod
    def from_record(cls, sweep: Sweep) -> SweepSummary:
        """Read what ``to_record`` returned."""
        sites = tuple(
            SiteCoverage(
                site.site,
                site.allocations,
                site.failed,
                Counter({Verdict(key): each for key, each in site.verdicts.items()}),
            )
            for site in sweep.sites
        )
        return cls(sweep.name, sites, sweep.failures, sweep.resumed, sweep.seconds)
