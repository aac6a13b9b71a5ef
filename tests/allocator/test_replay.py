"""The model answers recorded traces exactly as PyTorch's own allocator did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.allocator.replay import replay
from pytest_gpumem.errors import TraceError

TRACES = sorted((Path(__file__).parents[1] / "recordings" / "traces").glob("*.json"))


def _load(path: Path) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


def test_the_recordings_are_there() -> None:
    """Twenty traces, ten of them with default settings."""
    confs = [_load(path)["meta"]["conf"] for path in TRACES]

    assert 20 == len(confs)
    assert 10 == confs.count("")


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_a_trace_replays_exactly(path: Path) -> None:
    """Every row, error text, driver call and snapshot is the recorded one."""
    trace = _load(path)

    answer = replay(trace)

    assert trace["rows"] == answer.rows
    assert trace["oom"] == answer.oom
    assert trace["driver"] == answer.driver
    assert trace["snapshots"] == answer.snapshots
    assert {"rows": trace["rows"], "oom": trace["oom"]} == answer.to_dict()


def _small() -> dict[str, Any]:
    return {
        "meta": {
            "total_bytes": 2**30,
            "ctx": 0,
            "conf": "",
            "addr": "firstfit",
            "streams": {"0": 0},
        },
        "fields": ["allocated", "oom"],
        "events": [
            {"op": "alloc", "id": 0, "bytes": 1000, "stream": 0},
            {"op": "free", "id": 0},
        ],
    }


def test_rows_are_in_the_traces_columns() -> None:
    """The fields of the trace decide what a row holds."""
    assert [[1024, 0], [0, 0]] == replay(_small()).rows


def test_only_what_torch_counts_changes_a_row() -> None:
    """A request of 0 bytes, and the free of one that failed, do nothing."""
    trace = _small()
    trace["fields"] = ["allocated", "num_ooms", "ptr"]
    trace["events"] = [
        {"op": "alloc", "id": "a", "bytes": 0, "stream": 0},
        {"op": "free", "id": "a"},
        {"op": "alloc", "id": "a", "bytes": 2**31, "stream": 0},
        {"op": "free", "id": "a"},
    ]

    answer = replay(trace)

    assert [[0, 0, None], [0, 0, None], [0, 1, None], [0, 1, None]] == answer.rows
    assert ["2"] == list(answer.oom)


def test_streams_and_other_holders_can_be_replayed() -> None:
    """Recorded streams wait while events are pending; others' bytes count."""
    trace = _small()
    trace["meta"]["streams"] = {"0": 0, "1": 77}
    trace["fields"] = ["allocated", "active", "oom"]
    trace["events"] = [
        {"op": "events_pending", "value": 1},
        {"op": "alloc", "id": 0, "bytes": 1000, "stream": 0},
        {"op": "record_stream", "id": 0, "stream": 1},
        {"op": "free", "id": 0},
        {"op": "set_ctx", "bytes": 2**30},
        {"op": "alloc", "id": 1, "bytes": 2**20 + 1, "stream": 1},
        {"op": "record_stream", "id": 1, "stream": 1},
        {"op": "set_ctx", "bytes": 0},
        {"op": "set_fraction", "fraction": 0},
        {"op": "alloc", "id": 2, "bytes": 1, "stream": 0},
    ]

    rows = replay(trace).rows

    assert [0, 1024, 0] == rows[3]
    assert [0, 0, 1] == rows[5]
    assert [0, 0, 1] == rows[9]


def test_the_total_may_be_called_total() -> None:
    """A trace without total_bytes has its card's bytes in total."""
    trace = _small()
    trace["meta"]["total"] = trace["meta"].pop("total_bytes")

    assert [[1024, 0], [0, 0]] == replay(trace).rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("meta"), "the trace lacks 'meta'"),
        (lambda t: t.pop("events"), "the trace lacks 'events'"),
        (lambda t: t.update(events=3), "the trace: events=3, accepted is: list"),
        (lambda t: t.update(meta=[]), r"the trace: meta=\[\], accepted is: object"),
        (lambda t: t.update(snapshots=1), "snapshots=1, accepted is: object"),
        (lambda t: t["meta"].pop("total_bytes"), "'meta' lacks 'total"),
        (
            lambda t: t["meta"].update(total_bytes=True),
            "'meta': total_bytes=True, accepted is: integer",
        ),
        (lambda t: t["meta"].update(ctx=-1), "'meta': ctx=-1 is below 0"),
        (lambda t: t["meta"].update(ctx=10**5000), "'meta': ctx has more than 63 bits"),
        (lambda t: t["meta"].update(conf="magic:1"), "Unrecognized key 'magic'"),
        (lambda t: t["meta"].update(addr="up"), "address_policy='up'"),
        (
            lambda t: t["meta"].update(streams={"0": "x"}),
            "'streams': 0='x', accepted is: integer",
        ),
        (
            lambda t: t["fields"].append("colour"),
            "unknown column in 'fields': 'colour'",
        ),
        (lambda t: t["fields"].append([]), r"unknown column in 'fields': \[\]"),
        (lambda t: t["events"].append(None), "event 2 is None, not an object"),
        (lambda t: t["events"].append({"op": "melt"}), "event 2: unknown op 'melt'"),
        (lambda t: t["events"].append({"op": "free"}), "event 2 lacks 'id'"),
        (
            lambda t: t["events"].append({"op": "free", "id": 9}),
            "event 2: id 9 is not alive",
        ),
        (
            lambda t: t["events"].append({"op": "free", "id": 0}),
            "event 2: id 0 is not alive",
        ),
        (
            lambda t: t["events"].append({"op": "free", "id": []}),
            r"event 2: id=\[\], accepted is: integer or string",
        ),
        (
            lambda t: t["events"].append({"op": "set_fraction", "fraction": 1.5}),
            "event 2: invalid fraction: 1.5",
        ),
        (
            lambda t: t["events"].append({"op": "events_pending", "value": "no"}),
            "event 2: value='no', accepted is: integer or true or false",
        ),
        (lambda t: t["events"][0].update(bytes=-1), "event 0: bytes=-1 is below 0"),
        (lambda t: t["events"][0].update(bytes="x"), "event 0: bytes='x', accepted"),
        (lambda t: t["events"][0].update(bytes=1.5), "event 0: bytes=1.5, accepted"),
        (lambda t: t["events"][0].update(stream=3), "stream 3 is not in 'streams'"),
        (
            lambda t: t["events"].insert(1, dict(t["events"][0])),
            "event 1: id 0 is alive already",
        ),
    ],
)
def test_a_broken_trace_is_refused(change: Any, message: str) -> None:
    """What cannot be replayed raises one error that says what is wrong."""
    trace = _small()
    change(trace)

    with pytest.raises(
        TraceError, match=f"not a trace that can be replayed: .*{message}"
    ):
        replay(trace)


def test_a_list_is_no_trace() -> None:
    """The trace itself must be an object."""
    not_a_trace: Any = []

    with pytest.raises(TraceError, match=r"the trace is \[\], not an object"):
        replay(not_a_trace)


_events = st.lists(
    st.fixed_dictionaries(
        {"op": st.sampled_from(["alloc", "free", "record_stream", "set_ctx", "?"])},
        optional={
            "id": st.sampled_from([0, 1, "a", None]),
            "bytes": st.integers(-1, 2**62) | st.none(),
            "stream": st.integers(0, 1) | st.none(),
        },
    ),
    max_size=6,
)


@given(events=_events, conf=st.sampled_from(["", "expandable_segments:True", "x"]))
def test_any_events_replay_or_are_refused(events: Any, conf: str) -> None:
    """Events that are nearly right are replayed, or refused as all others."""
    trace = _small()
    trace["meta"]["conf"] = conf
    trace["events"] = events
    try:
        answer = replay(trace)
    except TraceError:
        return

    assert len(events) == len(answer.rows)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["op", "id", "meta", "events"]), inner)
    ),
    max_leaves=8,
)


@given(meta=_json, events=_json, fields=_json)
def test_any_json_replays_or_is_refused(meta: Any, events: Any, fields: Any) -> None:
    """No JSON makes the replay fail in any other way."""
    try:
        replay({"meta": meta, "events": events, "fields": fields})
    except TraceError:
        return

    assert [] == list(events)
