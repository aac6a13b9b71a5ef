"""Describes a sweep's results in words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from pytest_gpumem.records.record import Replay, Verdict
from pytest_gpumem.sizes import format_size
from pytest_gpumem.tables import align

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.records.record import Sweep
    from pytest_gpumem.sweeps.report import Outcome, SweepReport

#: The most points of a group that are described; the others are counted.
SHOWN: Final = 3


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def summarise(sweep: Sweep) -> str:
    """Return the outcome of a sweep on one line."""
    verdicts = sum((Counter(site.verdicts) for site in sweep.sites), Counter())
    counts = ", ".join(
        f"{verdicts[verdict]} {verdict.value}"
        for verdict in Verdict
        if verdicts[verdict]
    )
    allocations = [site.allocations for site in sweep.sites if site.allocations]
    resumed = f", {sweep.resumed} of them resumed" if sweep.resumed else ""
    return (
        f"{_count(sum(allocations), 'allocation')} at "
        f"{_count(len(allocations), 'site')}, "
        f"{_count(sweep.points, 'point')}{resumed}: "
        f"{counts or 'none run'} ({sweep.seconds:.1f} s)"
    )


def explain_failures(
    report: SweepReport, replay: Callable[[str], str], *, detailed: bool = True
) -> str:
    """Return the failing points, grouped by site and verdict, each with its replay.

    ``replay`` turns a point's rule into the command that replays it. Without ``detailed``
    the points of a group are counted and not described.
    """
    groups = report.failures_by_site()
    if not groups:
        return ""
    demand = "recover from" if report.recover else "survive"
    lines = [
        f"{report.name} does not {demand} {len(report.failures)} of "
        f"{len(report.outcomes)} faults"
    ]
    for (site, verdict), outcomes in groups.items():
        where = site or "an unknown site"
        if not detailed:
            first = replay(outcomes[0].point.rule)
            lines.append(f"{len(outcomes)} x {verdict.value} at {where}\n  {first}")
            continue
        lines.append(f"{verdict.value} at {where}:")
        for outcome in outcomes[:SHOWN]:
            lines += [
                f"  {line}" for line in describe_point(outcome, replay).splitlines()
            ]
        if len(outcomes) > SHOWN:
            lines.append(f"  ... and {len(outcomes) - SHOWN} more like these:")
            lines += [f"    {replay(each.point.rule)}" for each in outcomes[SHOWN:]]
    return "\n".join(lines)


def replays(report: SweepReport, replay: Callable[[str], str]) -> list[Replay]:
    """Return each group of failures with the replay of its first point."""
    return [
        Replay(site, verdict.value, len(outcomes), replay(outcomes[0].point.rule))
        for (site, verdict), outcomes in report.failures_by_site().items()
    ]


def describe_point(
    outcome: Outcome, replay: Callable[[str], str], *, detailed: bool = True
) -> str:
    """Return the outcome of one point, and the command that replays it."""
    point = outcome.point
    lines = [
        f"allocation {point.number}, {point.mode}, {point.flavour}: "
        f"{outcome.verdict.value}"
    ]
    if not detailed:
        return f"{lines[0]}, as before at this site\n  replay: {replay(point.rule)}"
    lines += [f"  {line}" for line in outcome.detail.splitlines()]
    if outcome.left_bytes > 0:
        known = "" if outcome.holders else ", held as by an earlier point"
        lines.append(f"  {format_size(outcome.left_bytes)} stay on the card{known}")
        lines += [f"    {holder}" for holder in outcome.holders]
    lines.append(f"  replay: {replay(point.rule)}")
    return "\n".join(lines)


def coverage_table(sweep: Sweep, *, most: int | None = None) -> str:
    """Return a table of sites: their allocations, failures and recoveries.

    ``most`` limits the number of sites; sites with failures that did not recover come
    first.
    None shows all sites, in the order in which the code reaches them.
    """
    sites = [(site, site.verdicts.get(Verdict.RECOVERED, 0)) for site in sweep.sites]
    if most is not None and len(sites) > most:
        sites.sort(key=lambda pair: pair[1] - pair[0].failed)
    rows = [("allocates", "failed", "recovered", "site")]
    rows += [
        (
            str(site.allocations),
            str(site.failed),
            str(recovered),
            site.site or "unknown",
        )
        for site, recovered in sites[:most]
    ]
    lines = align(rows)
    hidden = len(sites) - len(sites[:most])
    if hidden:
        lines.append(f"... and {_count(hidden, 'site')} more; -v shows all")
    return "\n".join(lines)
