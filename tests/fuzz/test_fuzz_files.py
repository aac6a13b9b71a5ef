"""Any file is read, refused by the project's own error, or of no use; never more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
from fuzzing import NESTED, broken, files, fuzz, json_values, texts
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pytest_gpumem.allocator.replay import replay
from pytest_gpumem.baselines.baseline import Baseline
from pytest_gpumem.checkpoints.cache import MANIFEST, find_damage
from pytest_gpumem.checkpoints.models import model_spec
from pytest_gpumem.checkpoints.weights import missing_weights
from pytest_gpumem.children.notes import SUFFIX, Note, read_notes, together
from pytest_gpumem.cli import main
from pytest_gpumem.errors import (
    BaselineError,
    CheckpointError,
    ReportError,
    TraceError,
)
from pytest_gpumem.records.codec import decode
from pytest_gpumem.records.memory_figures import MemoryFigures
from pytest_gpumem.records.record import (
    FallbackStep,
    Judgement,
    LimitOutcome,
    PhaseFigures,
    Record,
    Sweep,
    WiderFixture,
)
from pytest_gpumem.records.run_record import (
    BaselineOutcome,
    CardFacts,
    Change,
    Entry,
    Environment,
)
from pytest_gpumem.reports import document
from pytest_gpumem.reports.markdown import markdown
from pytest_gpumem.reports.page import page

if TYPE_CHECKING:
    import pytest

FIGURES = MemoryFigures(0, 9, 8, 7, 6, 5, 4, 3, 2, 1)

# -- documents that are right ---------------------------------------------------------

BASELINE: dict[str, Any] = {
    "format": "pytest-gpumem baseline",
    "version": 1,
    "peaks": {"T4": {"t.py::a": {"allocated": 5, "cuda:1 reserved": 2**21}}},
}
SITE = {"site": "a.py:f", "allocations": 2, "failed": 2, "verdicts": {"recovered": 2}}
SWEEP = {
    "nodeid": "t.py::a",
    "name": "a",
    "recover": True,
    "points": 2,
    "failures": 1,
    "resumed": 0,
    "seconds": 0.5,
    "sites": [SITE],
    "replays": [{"site": "a.py:f", "verdict": "leak", "points": 1, "command": "x"}],
}
STEP = {
    "cause": "2 MiB",
    "budget_bytes": 2**21,
    "fault": None,
    "rung": "cpu",
    "num_ooms": 1,
    "peak_reserved_bytes": 2**21,
    "left_bytes": 0,
    "holders": [],
    "problems": ["x"],
}
CARD = {
    "device_index": 0,
    "budget_bytes": None,
    "total_bytes": 2**34,
    "num_events": 2,
    "peak_bytes": 512,
    "points": [[1, 512, 2**21], [2, 0, 2**21]],
    "live_at_peak": [{"site": "a.py:3", "bytes": 512}],
}


def _report() -> dict[str, Any]:
    test = Record(
        "t.py::a",
        "passed",
        0.1,
        "T4",
        [PhaseFigures.of("call", FIGURES)],
        fixtures=[WiderFixture("module", "table", 5)],
        judgement=Judgement({"allocated left": 5}, ["f"], [("left", "t", 5)]),
        limits=[LimitOutcome("leak", None, "test", 4, 5, held=False)],
        sweeps=[decode(Sweep, SWEEP)],
        fallbacks=[[decode(FallbackStep, STEP)]],
        timeline=json.dumps([CARD]),
    )
    change = Change("t.py::a", "allocated", 1, 2, is_regression=True)
    baseline = BaselineOutcome("b.json", [change], [Entry("T4", "t", {"allocated": 1})])
    machine = Environment("h", "3", "x", None, "off", None, (CardFacts("T4", 5, None),))
    report = document.Report(("T4, no budget",), (machine,), baseline, (test,))
    return dict(json.loads(document.to_text(report)))


REPORT = _report()
SCHEMA = json.loads(
    (Path(__file__).parents[2] / "docs" / "report.schema.json").read_text("utf-8")
)
TRACE: dict[str, Any] = {
    "meta": {
        "name": "n",
        "total_bytes": 2**26,
        "ctx": 2**20,
        "conf": "max_split_size_mb:20,expandable_segments:False",
        "addr": "firstfit",
        "streams": {"0": 0, "1": 7},
    },
    "fields": ["allocated", "reserved", "num_ooms", "oom"],
    "events": [
        {"op": "set_fraction", "fraction": 0.9},
        {"op": "alloc", "id": 1, "bytes": 2**20, "stream": 0},
        {"op": "record_stream", "id": 1, "stream": 1},
        {"op": "events_pending", "value": True},
        {"op": "alloc", "id": "x", "bytes": 2**30, "stream": 1},
        {"op": "free", "id": 1},
        {"op": "set_ctx", "bytes": 2**21},
        {"op": "empty_cache"},
    ],
    "rows": [[0, 0, 0, 0]] * 8,
    "oom": {"4": "text"},
}


# -- baselines --------------------------------------------------------------------------


@fuzz
@given(content=files(BASELINE))
def test_a_baseline_is_read_or_refused(content: bytes, tmp_path: Path) -> None:
    """What is read can be compared, merged and written, and is then the same."""
    path = tmp_path / "b.json"
    path.write_bytes(content)
    try:
        baseline = Baseline.read(path)
    except BaselineError:
        assert 1 == main(["compare", str(path), str(path)])
        return

    assert 0 == main(["compare", str(path), str(path), "--fail=allocated:5%"])
    assert 0 == main(["merge", str(path), str(path), "--out", str(tmp_path / "o.json")])
    assert baseline == Baseline.read(tmp_path / "o.json")


@fuzz
@given(test=texts, environment=texts, nbytes=st.integers(0, 2**63 - 1))
def test_every_baseline_can_be_written(
    test: str, environment: str, nbytes: int, tmp_path: Path
) -> None:
    """Names of tests may be anything that a file's name can be."""
    baseline = Baseline({environment: {test: {"allocated": nbytes}}})

    baseline.write(tmp_path / "b.json")

    assert baseline == Baseline.read(tmp_path / "b.json")


# -- reports ----------------------------------------------------------------------------


@fuzz
@given(content=files(REPORT))
@example(content=json.dumps({**REPORT, "new": [1e400]}).encode())
@example(
    content=(json.dumps(REPORT)[:-1] + ',"new":' + "[" * 300 + "]" * 300 + "}").encode()
)
def test_a_report_is_read_or_refused(content: bytes, tmp_path: Path) -> None:
    """What is read can be shown, merged and compared, and written as it was."""
    path, out = tmp_path / "r.json", tmp_path / "o.json"
    path.write_bytes(content)
    try:
        report = document.read_report(path)
    except ReportError:
        assert 1 == main(["report", str(path)])
        assert 1 == main(["merge", str(path), str(path), "--out", str(out)])
        return

    assert report == document.parse(document.to_text(report), "again")
    assert markdown(report)
    assert "<script" in "".join(page(report))
    made = ["--html", str(tmp_path / "r.html"), "--md", str(tmp_path / "r.md")]
    assert 0 == main(["report", str(path), *made])
    assert 0 == main(["report", str(path)])
    assert 0 == main(["merge", str(path), str(path), "--out", str(out)])
    assert 0 == main(["compare", str(out), str(path), "--fail=reserved:0"])


@fuzz
@given(report=broken(REPORT))
def test_what_is_taken_for_a_report_is_one_by_the_schema(report: Any) -> None:
    """And the other way round, but for numbers that no card and no JSON has."""
    is_by_schema = jsonschema.Draft202012Validator(SCHEMA).is_valid(report)

    try:
        document.parse(json.dumps(report), "r.json")
    except ReportError:
        numbers = [*_numbers_of(report)]
        text = json.dumps(report)
        assert (
            not is_by_schema
            or any(word in text for word in ("Infinity", "NaN"))
            or any(abs(number) >= 2**63 for number in numbers)
            or any(isinstance(number, float) for number in numbers)  # 1.0 is an integer
        )
    else:
        assert is_by_schema or report.get("version") == 1


def _numbers_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for each in value for number in _numbers_of(each)]
    return [value] if isinstance(value, (int, float)) else []


# -- traces and recordings --------------------------------------------------------------


@fuzz
@given(content=files(TRACE))
def test_a_trace_is_replayed_or_refused(content: bytes, tmp_path: Path) -> None:
    """The command ends with 0 or, with a sentence, with 1."""
    path = tmp_path / "t.json"
    path.write_bytes(content)

    assert main(["replay", str(path)]) in (0, 1)


@fuzz
@given(trace=broken(TRACE) | json_values)
def test_a_replayed_trace_has_a_row_for_each_event(trace: Any) -> None:
    """Whatever its figures are."""
    try:
        answer = replay(trace)
    except TraceError:
        return

    assert len(trace["events"]) == len(answer.rows)
    assert all(len(trace["fields"]) == len(row) for row in answer.rows)


# -- what children keep -----------------------------------------------------------------


@fuzz
@given(
    environment=texts | texts.map(lambda text: 2000 * "n" + text),
    content=st.binary(max_size=40) | st.sampled_from(NESTED),
    end=st.integers(0, 9000),
)
def test_a_childs_broken_note_is_no_note(
    environment: str, content: bytes, end: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A whole one is read as it was written, whatever its card is called."""
    folder = tmp_path_factory.mktemp("notes")
    note = Note(folder, environment)
    note.write(3, [1, 2])
    note.write_card(0, FIGURES)
    (path,) = folder.iterdir()
    whole = path.read_bytes()

    (child,) = read_notes(folder)
    path.write_bytes(whole[:end] + content)
    (folder / f"other{SUFFIX}").write_bytes(content)
    rest = read_notes(folder)

    assert (environment, 3, (1, 2)) == (
        child.environment,
        child.num_requests,
        child.failed_counts[:2],
    )
    assert [FIGURES] == [*child.figures.values()]
    assert {environment} >= {each.environment for each in rest}
    assert len(rest) == len(together(rest))


# -- checkpoints ------------------------------------------------------------------------


@fuzz
@given(
    content=files(
        {
            "request": "x",
            "files": {"config.json": {"bytes": 2, "sample": "x", "sha256": "x"}},
        }
    )
)
def test_a_broken_manifest_is_damage(content: bytes, tmp_path: Path) -> None:
    """And is said in words."""
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / MANIFEST).write_bytes(content)

    assert isinstance(find_damage(tmp_path, {"a": 1}), str)
    damage = find_damage(tmp_path)
    assert damage is None or isinstance(damage, str)


@fuzz
@given(content=files({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
def test_a_broken_index_of_weights_is_damage(content: bytes, tmp_path: Path) -> None:
    """What it names is missing, or it cannot be read."""
    (tmp_path / "config.json").write_text("{}", "utf-8")
    (tmp_path / "model.safetensors.index.json").write_bytes(content)

    missing = missing_weights(tmp_path)

    assert missing is None or isinstance(missing, str)


@fuzz
@given(content=files({"model_type": "bert", "architectures": ["BertModel"], "x": 1}))
def test_a_models_config_is_read_or_refused(content: bytes, tmp_path: Path) -> None:
    """What is read says which model it is."""
    (tmp_path / "config.json").write_bytes(content)
    try:
        spec = model_spec(str(tmp_path))
    except CheckpointError:
        return

    assert spec.config_dict["model_type"]
    assume(spec.architecture is not None)
    assert isinstance(spec.architecture, str)
