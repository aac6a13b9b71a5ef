"""Sweeps as data: what is to be done, what became of it, and how it is said."""

from __future__ import annotations

import json
import threading
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpumem.errors import RuleError, SweepError
from pytest_gpumem.records.codec import decode, encode
from pytest_gpumem.records.record import FallbackStep, Replay, Sweep, SweptSite, Verdict
from pytest_gpumem.records.staircase import staircase_table
from pytest_gpumem.rules.rule import FLAVOURS, Rule
from pytest_gpumem.sweeps.plan import SweepPlan
from pytest_gpumem.sweeps.report import (
    Outcome,
    Point,
    SweepReport,
)
from pytest_gpumem.sweeps.state import SweepState
from pytest_gpumem.sweeps.sweep_record import summary_of, whole_sweeps
from pytest_gpumem.sweeps.text import (
    SHOWN,
    coverage_table,
    describe_point,
    explain_failures,
    replays,
    summarise,
)

if TYPE_CHECKING:
    from pathlib import Path


def an_outcome(
    number: int = 1,
    verdict: Verdict = Verdict.RECOVERED,
    *,
    site: str = "a.py:1 in f",
    flavour: str = "native",
    **fields: Any,
) -> Outcome:
    """Return what became of a point."""
    point = Point(number, "transient", flavour, f"any:nth={number}", site)
    return Outcome(point, verdict, **fields)


# -- plans ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"points": 0},
            SweepError,
            "points=0; accepted are 'all', 'sites', 'ends' or a number",
        ),
        ({"points": True}, SweepError, "points=True"),
        ({"points": "some"}, SweepError, "points='some'"),
        ({"modes": []}, SweepError, r"modes=\[\]; give a list"),
        ({"modes": "transient"}, SweepError, "modes='transient'"),
        ({"modes": ["once"]}, SweepError, "mode 'once'; accepted are transient, persi"),
        ({"flavours": ["x"]}, SweepError, "flavour 'x'; accepted are native, legacy"),
        ({"flavours": 3}, SweepError, "flavours=3; give a list, such as .'native'."),
        ({"points": -1}, SweepError, "points=-1"),
        ({"timeout_s": 0}, SweepError, "timeout_s=0; give seconds above 0"),
        ({"timeout_s": -1}, SweepError, "timeout_s=-1"),
        ({"timeout_s": float("nan")}, SweepError, "timeout_s=nan"),
        ({"timeout_s": "5"}, SweepError, "timeout_s='5'"),
        ({"timeout_s": threading.TIMEOUT_MAX * 2}, SweepError, "timeout_s="),
        ({"recover": "no"}, SweepError, "recover='no'; accepted are True and False"),
        ({"shard": (2, 2)}, SweepError, r"shard=\(2, 2\); give an index from 0"),
        ({"shard": (-1, 2)}, SweepError, "shard="),
        ({"shard": (0,)}, SweepError, "shard="),
        ({"shard": (0.0, 1)}, SweepError, "shard="),
        ({"rule": None}, SweepError, "rule=None is not a text such as 'load:nth=3'"),
        ({"only": 3}, SweepError, "only=3 is not a text"),
        ({"only": "x"}, RuleError, "'x' is not a phase"),
        ({"rule": "any:nth=2"}, SweepError, "says which allocations fail"),
        ({"rule": "any:times=2"}, SweepError, "leave phase, min, max, device, site"),
        ({"rule": "any:after=1MiB"}, SweepError, "says which allocations fail"),
        ({"rule": "any:every=2"}, SweepError, "says which allocations fail"),
        ({"rule": "any:p=0.5"}, SweepError, "says which allocations fail"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """It names the value and what is accepted."""
    with pytest.raises(error, match=message):
        SweepPlan(**options)


def test_a_plan_gives_the_rule_of_each_point() -> None:
    """The plan's own rule says which allocations count, the point which of them fails."""
    plan = SweepPlan(
        points=1, rule="load:min=1MiB,site=*x*", timeout_s=0.1, shard=(1, 2), only="any"
    )

    first = Rule("load", 7, 2**20, site="*x*")
    later = Rule("load", 7, 2**20, times=None, site="*x*", flavour="driver")
    assert str(first) == plan.point(7, "transient", "native").rule
    assert str(later) == plan.point(7, "persistent", "driver").rule
    assert SweepPlan(flavours=FLAVOURS, modes=("persistent",)).base() == Rule()


SITES = ("a", "b", "a", "c", "b", "a", "c", "c", "d", "a")


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, list(range(1, 11))),
        ({"points": "sites"}, [1, 2, 4, 9]),
        ({"points": 1}, [1]),
        ({"points": 2}, [1, 10]),
        ({"points": 4}, [1, 4, 7, 10]),
        ({"points": 9}, [1, 2, 3, 4, 5, 7, 8, 9, 10]),
        ({"points": 10}, list(range(1, 11))),
        ({"points": 11}, list(range(1, 11))),
        ({"shard": (0, 3)}, [1, 4, 7, 10]),
        ({"shard": (2, 3)}, [3, 6, 9]),
        ({"points": "sites", "shard": (1, 2)}, [2, 9]),
        ({"only": "any:nth=4"}, [4]),
    ],
)
def test_a_plan_chooses_its_points(options: dict[str, Any], numbers: list[int]) -> None:
    """All, the first of each site, or some spread evenly; a shard has every so-many-th."""
    points = list(SweepPlan(modes=["transient"], **options).points_of(SITES))

    assert numbers == [each.number for each in points]
    assert [SITES[each - 1] for each in numbers] == [each.site for each in points]
    assert [f"any:nth={each}" for each in numbers] == [each.rule for each in points]


def test_points_come_by_mode_and_flavour() -> None:
    """Each has the rule that replays it alone."""
    plan = SweepPlan(flavours=["native", "cublas"], rule="load")

    assert [
        ("transient", "native", "load:nth=1"),
        ("transient", "cublas", "load:nth=1,flavour=cublas"),
        ("persistent", "native", "load:nth=1,persistent"),
        ("persistent", "cublas", "load:nth=1,persistent,flavour=cublas"),
    ] == [(each.mode, each.flavour, each.rule) for each in plan.points_of(("a",))]


@pytest.mark.parametrize(
    ("rule", "point"),
    [
        ("any:nth=10", Point(10, "transient", "native", "any:nth=10", "a")),
        ("any:nth=11", Point(11, "transient", "native", "any:nth=11", "")),
        (
            "any:nth=2,persistent,flavour=xpu",
            Point(2, "persistent", "xpu", "any:nth=2,persistent,flavour=xpu", "b"),
        ),
    ],
)
def test_one_point_is_the_one_that_was_asked_for(rule: str, point: Point) -> None:
    """Also where the code does not allocate so often any more."""
    assert [point] == list(SweepPlan(only=rule).points_of(SITES))


@pytest.mark.parametrize(
    ("options", "is_whole"),
    [
        ({}, True),
        ({"shard": (0, 2)}, True),
        ({"shard": (1, 2)}, False),
        ({"points": "sites"}, False),
        ({"points": 3}, False),
        ({"only": "any:nth=1"}, False),
    ],
)
def test_only_a_whole_sweep_goes_on_to_the_end(
    options: dict[str, Any], *, is_whole: bool
) -> None:
    """And of its shards one, or each would run the same."""
    assert SweepPlan(**options).is_whole is is_whole


# -- the state of an interrupted sweep ----------------------------------------------------


def _interrupt(path: Path, *outcomes: Outcome, name: str = "s", count: int = 3) -> None:
    with suppress(KeyboardInterrupt), SweepState(path, name, count, "plan") as state:
        for each in outcomes:
            state.note(each)
        raise KeyboardInterrupt


def test_an_interrupted_sweep_knows_what_was_done(tmp_path: Path) -> None:
    """Again and again, until it is whole."""
    path = tmp_path / "new" / "state.jsonl"
    first, second = an_outcome(1), an_outcome(2, Verdict.LEAK, holders=("a", "b"))
    _interrupt(path, first)
    _interrupt(path, second)

    with SweepState(path, "s", 3, "plan") as state:
        known = [state.known(an_outcome(number).point) for number in (1, 2, 3)]
        assert path.exists()

    assert [first, second, None] == known
    assert not path.exists()


def test_a_line_that_was_written_in_part_is_run_again(tmp_path: Path) -> None:
    """What came before it is known."""
    path = tmp_path / "state.jsonl"
    _interrupt(path, an_outcome(1), an_outcome(2))
    path.write_text(path.read_text("utf-8")[:-20], "utf-8")

    with SweepState(path, "s", 3, "plan") as state:
        known = [state.known(an_outcome(number).point) for number in (1, 2)]

    assert [an_outcome(1), None] == known


@pytest.mark.parametrize("other", [{"name": "t"}, {"count": 4}])
def test_the_state_of_another_sweep_is_not_used(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    """Of another body, or of one that allocates otherwise now."""
    path = tmp_path / "state.jsonl"
    _interrupt(path, an_outcome(1), **other)

    with SweepState(path, "s", 3, "plan") as state:
        assert state.known(an_outcome(1).point) is None


def test_without_a_file_nothing_is_kept() -> None:
    """A sweep in a script needs none."""
    with SweepState(None, "s", 3, "plan") as state:
        state.note(an_outcome(1))
        assert state.known(an_outcome(1).point) is None


# -- verdicts and reports -----------------------------------------------------------------


@pytest.mark.parametrize("verdict", Verdict)
def test_only_two_ends_are_good(verdict: Verdict) -> None:
    """A clean OOM is one only where recovery was not demanded."""
    assert (verdict is Verdict.RECOVERED) == verdict.passes(recover=True)
    assert (verdict in (Verdict.RECOVERED, Verdict.CLEAN_OOM)) == (
        verdict.passes(recover=False)
    )


def test_nobody_must_recover_from_what_is_no_oom() -> None:
    """The negative control passes if its error comes through."""
    outcome = an_outcome(verdict=Verdict.CLEAN_OOM, flavour="not-oom")

    assert outcome.passes(recover=True)
    assert not an_outcome(verdict=Verdict.CLEAN_OOM).passes(recover=True)


def test_a_point_says_what_fails_and_where() -> None:
    """The site is left out where it is not known."""
    assert "allocation 3 fails, transient, native at a.py:1 in f" == str(
        an_outcome(3).point
    )
    assert "allocation 3 fails, transient, native" == str(an_outcome(3, site="").point)


def test_an_outcome_survives_json() -> None:
    """Every field of it."""
    outcome = an_outcome(
        2,
        Verdict.LEAK,
        detail="x\ny",
        left_bytes=5,
        holders=("h", "i"),
        seconds=0.25,
        num_injected=3,
    )

    assert outcome == decode(Outcome, json.loads(json.dumps(encode(outcome))))
    bare = Outcome(outcome.point, Verdict.RECOVERED)
    assert Outcome(outcome.point, Verdict.RECOVERED, "", 0, (), 0.0, 0) == bare


@pytest.fixture
def report() -> SweepReport:
    """Four allocations at two sites; three points failed, one was resumed."""
    a, b = "a.py:1 in f", "b.py:2 in g"
    outcomes = [
        an_outcome(1, site=a, seconds=0.5),
        an_outcome(2, Verdict.LEAK, site=b, seconds=0.25, left_bytes=2**20),
        an_outcome(3, Verdict.CLEAN_OOM, site=b, seconds=1.0),
        an_outcome(4, Verdict.LEAK, site=b, seconds=0.25),
    ]
    return SweepReport(
        "s", recover=True, sites=(a, b, b, b), outcomes=outcomes, num_resumed=1
    )


def test_a_report_counts_and_groups(report: SweepReport) -> None:
    """By verdict, and failures by site."""
    leak, oom = report.outcomes[1], report.outcomes[2]

    assert 4 == report.num_allocations
    assert report.outcomes[1:] == report.failures
    assert Counter({Verdict.LEAK: 2, Verdict.RECOVERED: 1, Verdict.CLEAN_OOM: 1}) == (
        report.verdicts
    )
    assert 2.0 == report.seconds
    assert {
        ("b.py:2 in g", Verdict.LEAK): [leak, report.outcomes[3]],
        ("b.py:2 in g", Verdict.CLEAN_OOM): [oom],
    } == report.failures_by_site()
    assert [("a.py:1 in f", 1, 1, 1), ("b.py:2 in g", 3, 3, 0)] == [
        (row.site, row.allocations, row.failed, row.verdicts.get(Verdict.RECOVERED, 0))
        for row in report.coverage()
    ]


def test_a_summary_is_the_reports(report: SweepReport) -> None:
    """And survives its record, whose sums it shows."""
    report.outcomes.append(an_outcome(9, site="late"))
    summary = summary_of(report, "t")
    entry = json.loads(json.dumps(encode(summary)))

    assert summary == decode(Sweep, entry)
    assert ("t", "s", True) == (summary.nodeid, summary.name, summary.recover)
    assert {"points": 5, "failures": 3, "resumed": 1, "seconds": 2.0} == {
        name: entry[name] for name in ("points", "failures", "resumed", "seconds")
    }
    assert {
        "site": "late",
        "allocations": 0,
        "failed": 1,
        "verdicts": {"recovered": 1},
    } == (entry["sites"][2])


def test_parts_of_a_sweep_are_joined() -> None:
    """Points add up; what each part counted in its clean run is the same."""

    def part(site: str, verdict: Any, number: int, test: str = "t") -> Sweep:
        sites = [
            SweptSite("both", 3, number, {Verdict(verdict): number}),
            SweptSite(site, 2, 0, {}),
        ]
        command = Replay(site, verdict, number, f"pytest {site}")
        times = (number, number + 1, 2 * number, 0.5 * number)
        return Sweep(test, "s", True, *times, sites, [command])

    first, other = part("a", "leak", 1), part("a", "leak", 1, "u")
    joined, alone = whole_sweeps([first, other, part("b", "hang", 3)])

    assert [
        SweptSite("both", 3, 4, {Verdict.LEAK: 1, Verdict.HANG: 3}),
        SweptSite("a", 2, 0, {}),
        SweptSite("b", 2, 0, {}),
    ] == joined.sites
    assert (4, 6, 8, 2.0) == (
        *(joined.points, joined.failures, joined.resumed),
        joined.seconds,
    )
    assert ["pytest a", "pytest b"] == [each.command for each in joined.replays]
    assert other == alone


# -- words --------------------------------------------------------------------------------


def test_a_summary_fits_on_a_line(report: SweepReport) -> None:
    """One of a thing is not many; verdicts come in their order."""
    empty = SweepReport("s", recover=False, sites=())

    assert (
        "4 allocations at 2 sites, 4 points, 1 of them resumed: 1 recovered, "
        "1 clean OOM, 2 leak (2.0 s)"
    ) == summarise(summary_of(report))
    assert "0 allocations at 0 sites, 0 points: none run (0.0 s)" == summarise(
        summary_of(empty)
    )
    one = SweepReport("s", recover=False, sites=("a",), outcomes=[an_outcome(site="a")])
    assert "1 allocation at 1 site, 1 point: 1 recovered (0.0 s)" == summarise(
        summary_of(one)
    )


def test_a_point_is_described_with_its_replay() -> None:
    """What is left and who holds it; as a repetition, in short."""
    outcome = an_outcome(
        2, Verdict.LEAK, detail="kept\nby you", left_bytes=2**20, holders=("a", "b")
    )
    bare = an_outcome(2, Verdict.LEAK, left_bytes=2**20)

    assert [
        "allocation 2, transient, native: leak",
        "  kept",
        "  by you",
        "  1 MiB stay on the card",
        "    a",
        "    b",
        "  replay: <any:nth=2>",
    ] == describe_point(outcome, "<{}>".format).splitlines()
    assert "  1 MiB stay on the card, held as by an earlier point" in describe_point(
        bare, "<{}>".format
    )
    assert [
        "allocation 2, transient, native: leak, as before at this site",
        "  replay: <any:nth=2>",
    ] == describe_point(outcome, "<{}>".format, detailed=False).splitlines()
    assert "stay" not in describe_point(an_outcome(), str)


def test_failures_are_explained_site_by_site(report: SweepReport) -> None:
    """Some of a group in full, the others by their replay; the record has the first of each."""
    b = "b.py:2 in g"
    report.outcomes += [an_outcome(n, Verdict.LEAK, site=b) for n in (5, 6)]

    text = explain_failures(report, "<{}>".format)

    shown = [line for line in text.splitlines() if "leak" in line and "alloc" in line]
    assert SHOWN == len(shown)
    assert all(f"<any:nth={number}>" in text for number in (2, 3, 4, 5, 6))
    assert [
        Replay(b, "leak", 4, "<any:nth=2>"),
        Replay(b, "clean OOM", 1, "<any:nth=3>"),
    ] == replays(report, "<{}>".format)


def test_coverage_shows_the_worst_sites_first(report: SweepReport) -> None:
    """All in the order of the code, or so many with what failed most on top."""
    report.sites += ("",)
    summary = summary_of(report)

    assert [
        "allocates  failed  recovered  site",
        "        1       1          1  a.py:1 in f",
        "        3       3          0  b.py:2 in g",
        "        1       0          0  unknown",
    ] == coverage_table(summary).splitlines()
    assert [
        "allocates  failed  recovered  site",
        "        3       3          0  b.py:2 in g",
        "... and 2 sites more; -v shows all",
    ] == coverage_table(summary, most=1).splitlines()
    assert coverage_table(summary) == coverage_table(summary, most=3)


def test_a_staircase_has_a_line_for_each_step() -> None:
    """Nothing counted is a hyphen."""
    steps = [
        FallbackStep(cause, None, None, rung, num_ooms, reserved, left, (), ())
        for cause, num_ooms, reserved, left, rung in (
            ("whole card", 0, 2**21, 0, "cuda:0"),
            ("2 MiB", 3, 512, 1, "cpu"),
            ("x", 1, 0, -1, "cpu"),
        )
    ]

    assert [
        "budget or fault  OOMs  peak reserved  left  rung",
        "     whole card     -          2 MiB     -  cuda:0",
        "          2 MiB     3          512 B   1 B  cpu",
        "              x     1            0 B     -  cpu",
    ] == staircase_table(steps).splitlines()
