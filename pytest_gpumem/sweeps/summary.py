"""A sweep's figures without its points: what crosses processes and goes into reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_gpumem.sweeps.report import SiteCoverage, SweepReport, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


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
    def whole(
        entries: Iterable[Mapping[str, Any]],
    ) -> dict[tuple[str, str], SweepSummary]:
        """Return whole sweeps of parts from several workers, by test and name.

        Args:
            entries: What ``to_json`` wrote, each with its test as ``"nodeid"``.

        Raises:
            KeyError: Something is missing.
            ValueError: There is no such verdict.
        """
        found: dict[tuple[str, str], SweepSummary] = {}
        for entry in entries:
            part = SweepSummary.from_json(entry)
            key = (str(entry["nodeid"]), part.name)
            found[key] = found[key].joined(part) if key in found else part
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the summary as what JSON can hold; ``from_json`` reads it."""
        return {
            "name": self.name,
            "sites": [
                {
                    "site": site.site,
                    "allocations": site.num_allocations,
                    "failed": site.num_failed,
                    "verdicts": {
                        verdict.value: count for verdict, count in site.verdicts.items()
                    },
                }
                for site in self.sites
            ],
            "points": self.num_points,
            "failures": self.num_failures,
            "resumed": self.num_resumed,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> SweepSummary:
        """Read what ``to_json`` wrote.

        Raises:
            KeyError: Something is missing.
            ValueError: There is no such verdict.
        """
        sites = tuple(
            SiteCoverage(
                site["site"],
                site["allocations"],
                site["failed"],
                Counter({Verdict(key): each for key, each in site["verdicts"].items()}),
            )
            for site in entry["sites"]
        )
        return cls(
            entry["name"], sites, entry["failures"], entry["resumed"], entry["seconds"]
        )
