"""A sweep's findings in words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.model.sweeps import Outcome, SweepReport, Verdict
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: How many points of a group are shown one by one; the others are counted.
SHOWN: Final = 3


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def to_record(
    report: SweepReport, nodeid: str = "", replay: Callable[[str], str] = str
) -> dict[str, Any]:
    """Return a sweep's findings as what JSON can hold.

    Args:
        report: The sweep.
        nodeid: The test that ran it.
        replay: Turns a point's rule into the line that replays it alone.
    """
    return {
        "nodeid": nodeid,
        "name": report.name,
        "recover": report.recover,
        "num_allocations": report.num_allocations,
        "num_sites": len(set(report.sites)),
        "num_points": len(report.outcomes),
        "num_resumed": report.num_resumed,
        "num_failures": len(report.failures),
        "seconds": round(report.seconds, 3),
        "coverage": [
            {
                "site": row.site,
                "num_allocations": row.num_allocations,
                "num_failed": row.num_failed,
                "verdicts": {
                    verdict.value: row.verdicts[verdict]
                    for verdict in Verdict
                    if row.verdicts[verdict]
                },
            }
            for row in report.coverage()
        ],
        "replays": [
            {
                "site": site,
                "verdict": verdict.value,
                "num_points": len(outcomes),
                "command": replay(outcomes[0].point.rule),
            }
            for (site, verdict), outcomes in report.failures_by_site().items()
        ],
    }


def summarise(record: Mapping[str, Any]) -> str:
    """Return the outcome of a sweep, by its record, on one line."""
    totals: Counter[str] = Counter()
    for row in record["coverage"]:
        totals.update(row["verdicts"])
    counts = ", ".join(
        f"{totals[verdict.value]} {verdict.value}"
        for verdict in Verdict
        if totals[verdict.value]
    )
    resumed = (
        f", {record['num_resumed']} of them resumed" if record["num_resumed"] else ""
    )
    return (
        f"{_count(record['num_allocations'], 'allocation')} at "
        f"{_count(record['num_sites'], 'site')}, "
        f"{_count(record['num_points'], 'point')}{resumed}: "
        f"{counts or 'none run'} ({record['seconds']:.1f} s)"
    )


def explain(
    report: SweepReport, replay: Callable[[str], str], *, detailed: bool = True
) -> str:
    """Return the failing points, grouped by site and verdict, each with its replay.

    Args:
        report: The sweep.
        replay: Turns a point's rule into the line that replays it alone.
        detailed: Whether the points themselves are described, not only counted.
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
        place = site or "an unknown site"
        if not detailed:
            first = replay(outcomes[0].point.rule)
            lines.append(f"{len(outcomes)} x {verdict.value} at {place}\n  {first}")
            continue
        lines.append(f"{verdict.value} at {place}:")
        for outcome in outcomes[:SHOWN]:
            lines += [f"  {line}" for line in describe(outcome, replay).splitlines()]
        if len(outcomes) > SHOWN:
            lines.append(f"  ... and {len(outcomes) - SHOWN} more like these:")
            lines += [f"    {replay(each.point.rule)}" for each in outcomes[SHOWN:]]
    return "\n".join(lines)


def describe(
    outcome: Outcome, replay: Callable[[str], str], *, detailed: bool = True
) -> str:
    """Return what became of one point, and the line that replays it."""
    point = outcome.point
    lines = [
        f"allocation {point.number}, {point.mode}, {point.flavour}: "
        f"{outcome.verdict.value}"
    ]
    if not detailed:
        return f"{lines[0]}, as before at this site\n  replay: {replay(point.rule)}"
    lines += [f"  {line}" for line in outcome.detail.splitlines()]
    if outcome.left_bytes > 0:
        lines.append(f"  {format_size(outcome.left_bytes)} stay on the card")
        lines += [f"    {holder}" for holder in outcome.holders]
    lines.append(f"  replay: {replay(point.rule)}")
    return "\n".join(lines)


def coverage_table(record: Mapping[str, Any]) -> str:
    """Return, for each site of a sweep's record, how often it allocates, failed and was recovered from."""
    rows = [("allocates", "failed", "recovered", "site")]
    rows += [
        (
            str(row["num_allocations"]),
            str(row["num_failed"]),
            str(row["verdicts"].get(Verdict.RECOVERED.value, 0)),
            row["site"] or "unknown",
        )
        for row in record["coverage"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(
            [
                *(cell.rjust(width) for cell, width in zip(row, widths, strict=False)),
                row[3],
            ]
        )
        for row in rows
    )
