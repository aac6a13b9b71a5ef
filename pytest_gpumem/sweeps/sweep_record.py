"""The figures of a sweep without its points, for reports and other processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_gpumem.records.record import Sweep, SweptSite

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pytest_gpumem.records.record import Replay
    from pytest_gpumem.sweeps.report import SweepReport


def summary_of(
    report: SweepReport, nodeid: str = "", replays: Sequence[Replay] = ()
) -> Sweep:
    """Return a report's figures; ``replays`` are for groups of points that ended badly."""
    return Sweep(
        nodeid,
        report.name,
        report.recover,
        len(report.outcomes),
        len(report.failures),
        report.num_resumed,
        report.seconds,
        report.coverage(),
        list(replays),
    )


def whole_sweeps(parts: Iterable[Sweep]) -> list[Sweep]:
    """Join the parts of sweeps that workers of pytest-xdist have run."""
    found: dict[tuple[str, str], Sweep] = {}
    for part in parts:
        key = (part.nodeid, part.name)
        found[key] = _joined(found[key], part) if key in found else part
    return list(found.values())


def _joined(one: Sweep, other: Sweep) -> Sweep:
    """Join two parts of one sweep, which have counted the same allocations."""
    sites = {site.site: site for site in one.sites}
    for site in other.sites:
        mine = sites.get(site.site, SweptSite(site.site, 0, 0, {}))
        verdicts = Counter(mine.verdicts) + Counter(site.verdicts)
        sites[site.site] = SweptSite(
            site.site,
            max(mine.allocations, site.allocations),
            mine.failed + site.failed,
            dict(verdicts),
        )
    return replace(
        one,
        points=one.points + other.points,
        failures=one.failures + other.failures,
        resumed=one.resumed + other.resumed,
        seconds=one.seconds + other.seconds,
        sites=list(sites.values()),
        replays=[*one.replays, *other.replays],
    )
