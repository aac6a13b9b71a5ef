"""Baselines without pytest: files, merges, and the gate."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.baselines.baseline import Baseline, metric_key, nearest
from pytest_gpumem.baselines.regressions import (
    DEFAULT_TOLERANCES,
    FirstUses,
    Tolerance,
    compare_figures,
    moved_by_torch,
    shifted,
)
from pytest_gpumem.errors import BaselineError
from pytest_gpumem.files import write_atomically
from pytest_gpumem.records.run_record import Change

T4 = "Tesla T4, simulated, torch 2.13"
peaks = st.dictionaries(
    st.text(min_size=1),
    st.dictionaries(
        st.text(min_size=1),
        st.dictionaries(
            st.sampled_from(["allocated", "reserved", "cuda:1 allocated"]),
            st.integers(0, 2**50),
            min_size=1,
        ),
        min_size=1,
    ),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(peaks)
def test_a_baseline_survives_its_file(values: dict[str, Any]) -> None:
    """Whatever tests are called; the text is the same each time."""
    baseline = Baseline(values)
    text = baseline.to_text()

    assert baseline == Baseline.parse(text, "a.json")
    assert text == Baseline.parse(text, "a.json").to_text()


@given(st.text() | json_values.map(json.dumps))
def test_any_other_file_is_refused_by_name(text: str) -> None:
    """With what to do; nothing else is raised."""
    with pytest.raises(BaselineError, match=r"^a\.json (is|has) .*; "):
        Baseline.parse(text, "a.json")


@given(json_values)
def test_damaged_peaks_are_refused(value: Any) -> None:
    """What has the right head and a wrong body."""
    text = json.dumps(
        {"format": "pytest-gpumem baseline", "version": 1, "peaks": [value]}
    )
    with pytest.raises(BaselineError, match="damaged"):
        Baseline.parse(text, "a.json")


@pytest.mark.parametrize("version", [3, 0, "1", None, True])
def test_a_newer_format_is_refused(version: Any) -> None:
    """It says what this version reads."""
    document = {"format": "pytest-gpumem baseline", "version": version, "peaks": {}}
    if version is True:
        return  # JSON's true reads as 1 would; it is no version anybody writes
    with pytest.raises(BaselineError, match=r"reads up to 2: upgrade it"):
        Baseline.parse(json.dumps(document), "a.json")


def test_a_missing_file_says_how_to_write_it(tmp_path: Path) -> None:
    """And one that cannot be read says why."""
    with pytest.raises(BaselineError, match="write it with --gpu-update-baseline"):
        Baseline.read(tmp_path / "none.json")
    with pytest.raises(BaselineError, match="cannot be read"):
        Baseline.read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BaselineError, match="cannot be read"):
        Baseline.read(tmp_path / "binary")


def test_an_update_takes_in_and_drops() -> None:
    """New tests come, known ones change, stale ones go, other environments stay."""
    baseline = Baseline({T4: {"a": {"allocated": 1}, "b": {"allocated": 2}}, "x": {}})
    baseline.update(T4, {"a": {"allocated": 3}, "c": {"allocated": 4}}, stale=["b"])

    assert {T4: {"a": {"allocated": 3}, "c": {"allocated": 4}}, "x": {}} == (
        baseline.peaks
    )


@given(peaks, peaks)
def test_a_merge_is_the_same_either_way(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    """The larger figure of each; merging again changes nothing."""
    one, other = Baseline(first), Baseline(second)
    one.merge(Baseline(second))
    other.merge(Baseline(first))
    again = Baseline(one.peaks)
    again.merge(Baseline(second))

    assert one == other == again


@pytest.mark.parametrize(
    ("text", "before", "now", "passes"),
    [
        ("allocated:5%", 1000, 1050, True),
        ("allocated:5%", 1000, 1051, False),
        ("allocated:0%", 1000, 1000, True),
        ("allocated:0%", 1000, 1001, False),
        ("reserved:16MiB", 0, 16 * 2**20, True),
        ("reserved:16MiB", 0, 16 * 2**20 + 1, False),
        ("allocated:0", 5, 5, True),
        ("allocated:5%", 1000, 10, True),
    ],
)
def test_a_tolerance_allows_so_much(
    text: str, before: int, now: int, *, passes: bool
) -> None:
    """Inclusive."""
    assert passes is Tolerance.parse(text).allows(before, now)


@pytest.mark.parametrize(
    "text",
    ["", "allocated", "peak:5%", "allocated:-1%", "allocated:nan%", "reserved:x"],
)
def test_a_tolerance_that_makes_no_sense_is_refused(text: str) -> None:
    """With the text that was given."""
    with pytest.raises(ValueError, match=r"^'"):
        Tolerance.parse(text)


def test_a_comparison_gates_on_what_has_a_tolerance() -> None:
    """The others are reported; new metrics and equal ones are not changes."""
    changes = compare_figures(
        "t",
        {"allocated": 100, "reserved": 100, "cuda:1 allocated": 100, "gone": 1},
        {"allocated": 100, "reserved": 300, "cuda:1 allocated": 300, "new": 1},
        [Tolerance.parse("allocated:5%")],
    )

    assert [("cuda:1 allocated", True), ("reserved", False)] == [
        (each.metric, each.is_regression) for each in changes
    ]
    assert "reserved 100 B -> 300 B (+200 B, +200.0 %)" == str(changes[1])


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure in the middle leaves the old text and nothing else."""
    path = tmp_path / "deep" / "file.json"
    write_atomically(path, "old")
    path.chmod(0o640)

    def fail(_self: Path, _target: Path) -> None:
        raise OSError("no")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "new")
    monkeypatch.undo()
    survived = path.read_text(encoding="utf-8")
    write_atomically(path, "newer")

    assert "old" == survived
    assert "newer" == path.read_text(encoding="utf-8")
    assert [path] == list(path.parent.iterdir())
    assert 0o640 == path.stat().st_mode & 0o777


def test_a_metric_of_another_card_is_named_by_it() -> None:
    """The first card goes without saying."""
    assert "allocated" == metric_key("allocated", 0)
    assert "cuda:1 reserved" == metric_key("reserved", 1)


def test_a_files_lines_are_sorted() -> None:
    """So that two branches' changes meet where they differ."""
    text = Baseline({"T4": {"b": {"x": 1, "a": 2**63 - 1}, "a": {}}}).to_text()

    keys = [line.split('"')[1] for line in text.splitlines() if '":' in line]

    assert ["fixtures", "format", "peaks", "T4", "a", "b", "a", "x", "version"] == keys
    assert Baseline.parse(text, "x").peaks["T4"]["b"] == {"a": 2**63 - 1, "x": 1}


@pytest.mark.parametrize("nbytes", ["-1", str(2**63), "1.0", "true", "null"])
def test_a_figure_that_no_card_has_is_damage(nbytes: str) -> None:
    """Peaks are whole bytes of at most 63 bits."""
    text = Baseline({"T4": {"a": {"x": 7}}}).to_text().replace("7", nbytes)

    with pytest.raises(BaselineError, match="damaged"):
        Baseline.parse(text, "x")


@pytest.mark.parametrize(
    ("before", "now", "percent"),
    [(100, 101, 1.0), (100, 50, -50.0), (0, 0, 0.0), (0, 1, float("inf"))],
)
def test_a_change_has_a_percentage(before: int, now: int, percent: float) -> None:
    """From nothing it is infinite."""
    change = Change("t", "allocated", before, now, is_regression=False)

    assert percent == change.percent


def test_the_gate_that_nobody_named_lets_one_percent_pass() -> None:
    """Of allocated bytes; nothing is said of reserved ones."""
    before = {"allocated": 1000, "reserved": 1000}

    def regressions(**now: int) -> list[str]:
        return [
            each.metric
            for each in compare_figures("t", before, now, DEFAULT_TOLERANCES)
            if each.is_regression
        ]

    assert [] == regressions(allocated=1010, reserved=9999)
    assert ["allocated"] == regressions(allocated=1011)


def test_two_that_change_a_file_lose_nothing(tmp_path: Path) -> None:
    """Each reads it again under a lock; no lock is left, and a link stays one."""
    path = tmp_path / "link.json"
    path.symlink_to(tmp_path / "b.json")

    def add(first: int) -> None:
        for number in range(first, first + 20):
            entry = {f"test_{number}": {"allocated": number}}
            Baseline.revise(path, lambda it, entry=entry: it.update(T4, entry))  # type: ignore[misc]

    threads = [threading.Thread(target=add, args=(each,)) for each in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 40 == len(Baseline.read(path).peaks[T4])
    assert not Baseline.revise(path, lambda _baseline: None)
    assert path.is_symlink()
    assert {"link.json", "b.json"} == {each.name for each in tmp_path.iterdir()}


def test_files_of_other_editors_are_read_or_refused_in_words(tmp_path: Path) -> None:
    """A byte order mark is passed over; what is not UTF-8 says how to save it."""
    path = tmp_path / "b.json"
    text = Baseline({T4: {"a": {"allocated": 1}}}).to_text()
    path.write_text(text, encoding="utf-8-sig")
    assert {"a": {"allocated": 1}} == Baseline.read(path).peaks[T4]

    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8"))  # as on Windows
    assert {"a": {"allocated": 1}} == Baseline.read(path).peaks[T4]

    path.write_text(text, encoding="utf-16")
    with pytest.raises(BaselineError, match="not in UTF-8; save it in UTF-8"):
        Baseline.read(path)


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (["2.12", "2.10"], "2.12"),
        (["2.14", "2.12"], "2.12"),
        (["2.14", "1.13"], "2.14"),
        (["2.9", "2.20"], "2.9"),
        ([], None),
    ],
)
def test_the_nearest_version_stands_for_one_that_lacks(
    known: list[str], found: str | None
) -> None:
    """Of the same card and backend; of two as near, the earlier."""
    head = "Tesla T4, simulated, torch"
    others = [*(f"{head} {each}" for each in known), "NVIDIA L4, cuda, torch 2.13"]

    assert nearest(f"{head} 2.13", others) == (found and f"{head} {found}")
    assert nearest("no such thing", others) is None


def test_what_moved_in_most_tests_is_torchs() -> None:
    """Three at least, and most of those that changed; who moved less was not moved."""

    def entry(growth: int) -> dict[str, int]:
        return {"allocated": growth, "allocated growth": growth}

    same = [(entry(100), entry(100))] * 9
    moved = [(entry(each), entry(each + 8)) for each in (100, 200, 300)]

    assert {} == moved_by_torch(same)
    assert {} == moved_by_torch(moved[:2])
    assert {"allocated": 8} == moved_by_torch([*moved, *same, (entry(1), entry(99))])
    assert {} == moved_by_torch([*moved, *((entry(1), entry(n)) for n in (2, 3, 4))])
    assert 108 == shifted(entry(100), entry(150), {"allocated": 8})["allocated growth"]
    assert 100 == shifted(entry(100), entry(104), {"allocated": 8})["allocated growth"]


def test_who_comes_first_pays_for_all() -> None:
    """Just as much as others left, who have not run; one that leaves it again denies it."""
    name = "allocated left"
    uses = FirstUses({"a": {name: 20}, "b": {name: 5}, "c": {"allocated": 9}})

    assert {} == uses.begin("c")
    assert [False, True, True] == [uses.can_pay("c", name, n) for n in (6, 25, 20)]
    uses.pay("c", name, 20)
    assert not uses.can_pay("c", name, 20)
    assert {name: 20} == uses.begin("a")
    assert [(name, "c", 20)] == uses.deny("a")
    assert {} == uses.begin("a")
    assert {} == uses.begin("b")
    assert not uses.can_pay("c", name, 5)


def test_first_uses_are_of_other_tests_on_the_same_card() -> None:
    """And of bytes that stay, not of a peak."""
    first, second = (f"{metric_key('allocated', index)} left" for index in range(2))
    entries = {"a": {first: 20, "allocated growth": 7}, "b": {second: 5}}
    uses = FirstUses(entries)

    assert uses.can_pay("c", second, 5)
    assert not uses.can_pay("c", first, 5)
    assert not uses.can_pay("c", "allocated growth", 7)
    assert not uses.can_pay("a", first, 20)


def test_the_same_requests_from_other_blocks_are_no_change() -> None:
    """Where something else was on the card; where it was not, bytes are bytes."""
    before = {
        "allocated": 100,
        "allocated growth": 100,
        "allocated before": 0,
        "requested growth": 90,
        "reserved": 100,
        "reserved before": 0,
        "reserved growth": 100,
    }
    gate = [Tolerance.parse("allocated:1%")]
    now = {**before, "allocated growth": 110, "reserved growth": 300}

    assert {"allocated", "reserved"} == {
        each.metric for each in compare_figures("t", before, now, gate)
    }
    assert [] == compare_figures("t", before, {**now, "reserved before": 50}, gate)
    asked = {**now, "reserved before": 50, "requested growth": 95}
    assert ["allocated"] == [
        each.metric
        for each in compare_figures("t", before, asked, gate)
        if each.is_regression
    ]
