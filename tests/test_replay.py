"""The model answers recorded traces exactly as PyTorch's own allocator did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.errors import TraceError
from pytest_gpumem.model.replay import replay

TRACES = sorted((Path(__file__).parent / "recordings" / "traces").glob("*.json"))


def _load(path: Path) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return trace


def _is_modelled(path: Path) -> bool:
    return "expandable_segments" not in _load(path)["meta"]["conf"]


def test_the_recordings_are_there() -> None:
    """Twenty traces, ten of them with default settings."""
    confs = [_load(path)["meta"]["conf"] for path in TRACES]

    assert 20 == len(confs)
    assert 10 == confs.count("")


@pytest.mark.parametrize(
    "path", [path for path in TRACES if _is_modelled(path)], ids=lambda path: path.stem
)
def test_a_trace_replays_exactly(path: Path) -> None:
    """Every row, error text, driver call and snapshot is the recorded one."""
    trace = _load(path)

    answer = replay(trace)

    assert trace["rows"] == answer.rows
    assert trace["oom"] == answer.oom
    assert trace["driver"] == answer.driver
    assert trace["snapshots"] == answer.snapshots
    assert {"rows": trace["rows"], "oom": trace["oom"]} == answer.to_dict()


@pytest.mark.parametrize(
    "path",
    [path for path in TRACES if not _is_modelled(path)],
    ids=lambda path: path.stem,
)
def test_an_unmodelled_setting_is_refused(path: Path) -> None:
    """Expandable segments are refused by name, not answered wrongly."""
    with pytest.raises(TraceError, match="expandable_segments"):
        replay(_load(path))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("meta"), "KeyError: 'meta'"),
        (lambda t: t["meta"].pop("total_bytes"), "total_bytes"),
        (
            lambda t: t["fields"].append("colour"),
            r"unknown columns in 'fields': \['col",
        ),
        (lambda t: t["events"].append({"op": "melt"}), "event 2: unknown op 'melt'"),
        (lambda t: t["events"].append({"op": "free", "id": 9}), "KeyError: 9"),
        (lambda t: t["events"][0].update(bytes=-1), "event 0: bytes=-1 is no size"),
        (lambda t: t["events"][0].update(bytes="x"), "event 0: bytes='x' is no size"),
        (lambda t: t["events"][0].update(stream=3), "KeyError: 3"),
        (
            lambda t: t["events"].insert(1, dict(t["events"][0])),
            "id 0 is alive already",
        ),
        (lambda t: t["meta"].update(conf="magic:1"), "Unrecognized key 'magic'"),
        (lambda t: t.update(events=3), "TypeError"),
    ],
)
def test_a_broken_trace_is_refused(change: Any, message: str) -> None:
    """What cannot be replayed raises one error that says what is wrong."""
    trace = _small()
    change(trace)

    with pytest.raises(TraceError, match=message):
        replay(trace)


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
