"""Records on their way through reports, and between processes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.plugin.marks import LIMIT_METRICS, LIMIT_PHASES
from pytest_gpumem.records.codec import DamageError, decode, encode, required_of
from pytest_gpumem.records.junit import properties
from pytest_gpumem.records.memory_figures import MemoryFigures
from pytest_gpumem.records.record import (
    Contention,
    FallbackStep,
    Judgement,
    LimitOutcome,
    LimitPhase,
    MadeFixture,
    Metric,
    PhaseFigures,
    Record,
    Replay,
    ShrunkBatch,
    Sweep,
    SweptSite,
    Verdict,
    WiderFixture,
)

FIGURES = MemoryFigures(1, 10, 24, 9, 10, 0, 1, 2, 3, 4, 11)
SWEEP = Sweep(
    "t",
    "s",
    recover=True,
    points=2,
    failures=1,
    resumed=0,
    seconds=0.5,
    sites=[SweptSite("a.py:f", 2, 2, {Verdict.LEAK: 2})],
    replays=[Replay("a.py:f", "leak", 1, "pytest t")],
)
#: One in which every field is said.
FULL = Record(
    "t",
    "failed",
    0.5,
    "T4",
    [PhaseFigures.of("call", FIGURES)],
    host="h",
    fixtures=[WiderFixture("module", "table", 5)],
    growth={"allocated growth": 7},
    judgement=Judgement({"allocated left": -3}, ["c.py::f"], [("left", "u", 3)]),
    fixture_growth=[MadeFixture("c.py::f", "module", {"allocated": 5})],
    limits=[LimitOutcome("leak", None, "test", 4, 5, held=False)],
    children=2,
    peak_host_bytes=6,
    unknown="why",
    waited_s=1.25,
    contention=Contention(0, 9, 8, 7, "a.py:1"),
    broken_limit="broken",
    incident="out",
    site="a.py:1",
    snapshot="s.pickle",
    max_vram_bytes=9,
    smallest_budget_bytes=8,
    smallest_budget_note="note",
    sweeps=[SWEEP, SWEEP],
    fallbacks=[[FallbackStep("c", None, "r", "cpu", 1, 5, -1, ("h",), ("p",))]],
    shrunk_batches=[ShrunkBatch("train", 20, 14)],
    timeline="[]",
)


def test_no_field_is_forgotten_here() -> None:
    """Each of the full record's differs from that of a new one."""
    empty = Record.begin("u")

    for each in fields(Record):
        assert getattr(FULL, each.name) != getattr(empty, each.name), each.name


def test_a_record_survives_the_way_from_a_worker() -> None:
    """And a report; a new one too."""
    for record in (FULL, Record.begin("t")):
        assert record == Record.of_texts(json.loads(json.dumps(record.to_texts())))
        assert record == decode(Record, json.loads(record.text))


def test_the_names_of_junits_properties_are_as_documented() -> None:
    """Users' dashboards read them."""
    found = properties(FULL)

    assert [
        ("gpumem.environment", "T4"),
        ("gpumem.call.cuda1.peak_allocated_bytes", 10),
        ("gpumem.call.cuda1.peak_reserved_bytes", 24),
    ] == found[:3]
    assert {
        "gpumem.host": "h",
        "gpumem.fixture.module.table": 5,
        "gpumem.growth": '{"peaks":{"allocated growth":7},"moved":{"allocated left":-3},'
        '"because":["c.py::f"],"denied":[["left","u",3]]}',
        "gpumem.fixture_growth": '{"key":"c.py::f","scope":"module","peaks":'
        '{"allocated":5}}',
        "gpumem.limits": '[{"metric":"leak","device_index":null,"phase":"test",'
        '"limit_bytes":4,"measured_bytes":5,"held":false}]',
        "gpumem.children": 2,
        "gpumem.peak_host_bytes": 6,
        "gpumem.unknown": "why",
        "gpumem.waited_s": "1.25",
        "gpumem.contention": '{"device_index":0,"needed_bytes":9,"share_bytes":8,'
        '"others_bytes":7,"site":"a.py:1"}',
        "gpumem.over_limit": 1,
        "gpumem.broken_limit": "broken",
        "gpumem.incident": "out",
        "gpumem.site": "a.py:1",
        "gpumem.snapshot": "s.pickle",
        "gpumem.max_vram": 9,
        "gpumem.smallest_budget": 8,
        "gpumem.smallest_budget_note": "note",
        "gpumem.sweep": json.dumps(encode(SWEEP), separators=(",", ":")),
        "gpumem.fallback": '[{"cause":"c","budget_bytes":null,"fault":"r","rung":"cpu",'
        '"num_ooms":1,"peak_reserved_bytes":5,"left_bytes":-1,"holders":["h"],'
        '"problems":["p"]}]',
        "gpumem.shrunk_batches": '[{"function":"train","first":20,"last":14}]',
    } == {name: value for name, value in found[1:] if ".cuda1." not in name}


@dataclass(slots=True)
class _Newer(Record):
    """A record with one field more.

    Attributes:
        steps: A new figure.
    """

    steps: int = 0


def test_a_new_field_needs_no_more_than_its_declaration() -> None:
    """It is sent, written, read and shown."""
    record = _Newer("t", "passed", 0.5, "T4", [], steps=3)

    assert record == _Newer.of_texts(record.to_texts())
    assert record == decode(_Newer, json.loads(record.text))
    assert ("gpumem.steps", 3) in properties(record)
    assert required_of(_Newer) == required_of(Record)


def test_what_holds_for_a_further_attempt_is_kept() -> None:
    """What fixtures of wider scope took is not taken again."""
    kept = FULL.lasting()

    assert kept is not None
    assert [WiderFixture("module", "table", 5)] == kept.fixtures
    assert ([], None, "passed") == (kept.figures, kept.broken_limit, kept.outcome)
    assert Record("t", "failed", 1.0, "T4", []).lasting() is None


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"outcome": "good"}, ".outcome is 'good', accepted is one of 'passed'"),
        ({"children": True}, ".children is True, accepted is an integer from 0 on"),
        ({"seconds": "1"}, ".seconds is '1', accepted is a number"),
        ({"figures": [{"phase": "call"}]}, ".figures[0].device_index is missing"),
        ({"growth": {"a": -1}}, ".growth.a is -1, accepted is an integer from 0 on"),
        ({"timeline": [7]}, ".timeline[0] is 7, accepted is an object"),
        ({"contention": []}, ".contention is [], accepted is an object"),
    ],
)
def test_damage_is_named_by_its_place(change: dict[str, object], where: str) -> None:
    """What was found there, and what is accepted."""
    with pytest.raises(DamageError) as caught:
        decode(Record, {**json.loads(FULL.text), **change})

    assert str(caught.value).startswith(where)


def test_what_an_older_version_lacks_takes_its_default() -> None:
    """And what a newer one has is left out."""
    old = {"nodeid": "t", "outcome": "passed", "seconds": 0, "environment": "T4"}

    found = decode(Record, {**old, "figures": [], "newer": [float("nan")]})

    assert Record("t", "passed", 0, "T4", []) == found


def test_names_are_those_of_other_rooms() -> None:
    """Which the records may not ask."""
    assert {*LIMIT_METRICS, "leak", "host"} == set(get_args(Metric))
    assert set(LIMIT_PHASES) == set(get_args(LimitPhase))


@given(
    figures=st.builds(
        MemoryFigures,
        **dict.fromkeys(
            [each.name for each in fields(MemoryFigures)], st.integers(0, 2**40)
        ),
    ),
    phase=st.sampled_from(["setup", "call", "teardown"]),
)
def test_figures_are_the_same_of_a_phase(figures: MemoryFigures, phase: str) -> None:
    """As a record has them, and as JSON has them."""
    found = PhaseFigures.of(phase, figures)

    assert found == decode(PhaseFigures, json.loads(json.dumps(encode(found))))
    assert phase == found.phase
    assert encode(figures) == {
        name: value
        for name, value in encode(found).items()
        if name not in ("phase", "kinds")
    }


def test_a_process_holds_what_is_reserved_and_its_context() -> None:
    """The largest of each metric, by its name; the driver may not tell the last."""
    metrics = ("allocated", "reserved", "process")
    known = replace(FIGURES, peak_process_bytes=24 + 11)

    assert [10, 24, None] == [FIGURES.peak(metric) for metric in metrics]
    assert [10, 24, 24 + 11] == [known.peak(metric) for metric in metrics]
