"""Reports without a run: the document, Markdown, the timeline, the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pytest_gpumem import simulated_device
from pytest_gpumem.baselines.baseline import Baseline
from pytest_gpumem.cli import main
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.errors import ReportError
from pytest_gpumem.instruments.timeline import MAX_GROUPS, MAX_POINTS, Series, Timeline
from pytest_gpumem.records.memory_figures import MemoryFigures
from pytest_gpumem.records.record import PhaseFigures, Record
from pytest_gpumem.records.run_record import BaselineOutcome, Change, Entry, Environment
from pytest_gpumem.reports import document
from pytest_gpumem.reports.markdown import escape, markdown
from pytest_gpumem.reports.merging import merge

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"


def a_record(test: str, nbytes: int) -> Record:
    """Return the record of a test with this peak."""
    figures = MemoryFigures(0, nbytes, nbytes, nbytes, nbytes, 0, 0, 0, 0, 0)
    return Record(test, "passed", 0.1, "T4", [PhaseFigures.of("call", figures)])


def a_report(tmp_path: Path, name: str, **peaks: int) -> Path:
    """Write a report of tests with these peaks."""
    path = tmp_path / name
    found = document.by_name(a_record(*each) for each in peaks.items())
    path.write_text(document.to_text(document.Report((name,), tests=found)), "utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "is not a report"),
        ('{"format": "pytest-gpumem report", "version": 9}', "upgrade it"),
        ('{"format": "pytest-gpumem report", "version": 1}', "is damaged"),
        (
            '{"format": "pytest-gpumem report", "version": 2, "runs": [], '
            '"tests": [{"nodeid": "a", "figures": [7], "environment": ""}]}',
            "is damaged",
        ),
        (
            '{"format": "pytest-gpumem report", "version": 2, "runs": [], "tests": [], '
            '"baseline": {"file": 7}}',
            "is damaged",
        ),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    """The error says what is wrong."""
    with pytest.raises(ReportError, match=message):
        document.parse(text, "r.json")


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    """What is written is read."""
    path = a_report(tmp_path, "a.json", one=1, two=2)
    report = document.read_report(path)
    assert document.to_text(report) == path.read_text("utf-8")
    assert ["one", "two"] == [each.nodeid for each in report.tests]


def test_markdown_shows_the_largest_and_counts_the_others(tmp_path: Path) -> None:
    """And its cells hold nothing that means more than itself."""
    peaks = {f"test_{number}": number * 2**20 for number in range(1, 31)}
    text = markdown(document.read_report(a_report(tmp_path, "a.json", **peaks)))
    assert "| test&#95;30 | passed | 30 MiB |" in text
    assert "test&#95;10 |" not in text
    assert "… and 10 more" in text
    assert "&lt;b&gt;&#124;&#96; x" == escape("<b>|`\n x")


def test_a_series_is_short_and_keeps_its_peak() -> None:
    """However many events there are."""
    series = Series()
    for event in range(100_000):
        series.add(10**6 if event == 70_001 else event % 1000, 5)
    points = series.points
    assert len(points) <= MAX_POINTS + 2
    assert 10**6 == max(allocated for _event, allocated, _reserved in points)
    assert (100_000, 999, 5) == points[-1]
    assert sorted(points) == points


def test_a_timeline_knows_what_was_live_at_the_peak() -> None:
    """By site, exactly; what was there before is told apart; so is what is too much."""
    import torch

    with simulated_device("T4"):
        device = active_device()
        before = torch.zeros(2**18, device="cuda")
        with Timeline(device) as timeline:
            freed = torch.zeros(2**19, device="cuda")
            del freed
            kept = [torch.zeros(2**20, device="cuda") for _ in range(2)]
            with timeline.paused():
                torch.zeros(2**22, device="cuda")
            kept.clear()
        code = "".join(f"t{n} = torch.zeros(128, device='cuda')\n" for n in range(20))
        with Timeline(device) as many:
            exec(compile(code, "user.py", "exec"), {"torch": torch})  # noqa: S102  # twenty lines
    del before

    (card,) = timeline.result()
    live = card["live_at_peak"]
    assert 9 * 2**20 == card["peak_bytes"] == sum(each["bytes"] for each in live)
    assert [8 * 2**20, 2**20] == [each["bytes"] for each in live]
    assert "test_reports.py" in live[0]["site"]
    assert "held before the test" == live[1]["site"]
    assert 6 == card["num_events"]
    groups = many.result()[0]["live_at_peak"]
    assert MAX_GROUPS + 2 == len(groups)
    assert 8 * 512 == groups[-2]["bytes"]


def test_report_makes_a_page_and_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into files, or Markdown to the screen."""
    path = a_report(tmp_path, "a.json", one=2**20)
    page, text = tmp_path / "r.html", tmp_path / "r.md"

    assert 0 == main(["report", str(path), "--html", str(page), "--md", str(text)])
    assert 0 == main(["report", str(path)])

    assert '"nodeid":"one"' in page.read_text("utf-8")
    assert text.read_text("utf-8") == capsys.readouterr().out
    assert 1 == main(["report", str(text)])
    assert "is not JSON" in capsys.readouterr().err


def test_merge_joins_reports_and_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not one of each."""
    a, b = a_report(tmp_path, "a", one=1, two=2), a_report(tmp_path, "b", two=3)
    out = tmp_path / "out"
    assert 0 == main(["merge", str(a), str(b), "--out", str(out)])
    peaks = {
        each.nodeid: each.figures[0].peak_allocated_bytes
        for each in document.read_report(out).tests
    }
    assert {"one": 1, "two": 3} == peaks

    first, second = tmp_path / "1.json", tmp_path / "2.json"
    Baseline({"T4": {"one": {"allocated": 5}}}).write(first)
    Baseline({"T4": {"one": {"allocated": 7}}}).write(second)
    assert 0 == main(["merge", str(first), str(second), "--out", str(out)])
    assert {"one": {"allocated": 7}} == Baseline.read(out).peaks["T4"]

    assert 1 == main(["merge", str(a), str(first), "--out", str(out)])
    assert "not both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fail", "code"),
    [([], 0), (["--fail=allocated:5%"], 1), (["--fail=allocated:50%"], 0)],
)
def test_compare_shows_changes_and_fails_as_it_is_told(
    fail: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report against a report, and against a baseline."""
    before = a_report(tmp_path, "a", one=100 * 2**20, two=7)
    now = a_report(tmp_path, "b", one=110 * 2**20, two=7, three=1)
    baseline = tmp_path / "c.json"
    Baseline({"T4": {"one": {"allocated": 100 * 2**20}}}).write(baseline)

    assert code == main(["compare", str(before), str(now), *fail])
    out = capsys.readouterr().out
    assert code == main(["compare", str(baseline), str(now), *fail])

    assert "100 MiB  110 MiB  +10 MiB  +10.0  allocated" in out
    assert "1 tests changed, 1 the same, 1 new" in out


def test_compare_refuses_what_does_not_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another card, or a tolerance that is none."""
    report = a_report(tmp_path, "a", one=1)
    other = tmp_path / "b.json"
    Baseline({"A100": {"one": {"allocated": 1}}}).write(other)

    assert 1 == main(["compare", str(report), str(other)])
    assert "share no environment: T4 and A100" in capsys.readouterr().err
    assert 1 == main(["compare", str(report), str(report), "--fail=5%"])
    assert "--fail: '5%'" in capsys.readouterr().err
    assert 1 == main(["compare", "missing.json", str(report)])
    assert "missing.json does not exist; write it" in capsys.readouterr().err


def test_merging_keeps_what_the_runs_said() -> None:
    """Each change, machine and new test once; what one shard ran is stale in none."""

    def one(now: int, host: str) -> document.Report:
        entries = [Entry("T4", test, {"allocated": 1}) for test in ("s", "t")]
        change = Change("t", "allocated", 1, now, is_regression=True)
        machine = Environment(host, "", "", None, "off", None)
        baseline = BaselineOutcome("b.json", [change], entries[:1], entries)
        return document.Report(("run",), (machine,), baseline, (a_record("t", now),))

    merged = json.loads(
        document.to_text(merge([one(2, "a"), one(3, "b"), one(3, "b")]))
    )

    baseline = merged["baseline"]
    assert [3] == [each["now"] for each in baseline["changes"]]
    assert ["s"] == [each["test"] for each in baseline["new"]]
    assert ["s"] == [each["test"] for each in baseline["stale"]]
    assert ["run"] == merged["runs"]
    assert ["a", "b"] == [each["host"] for each in merged["environments"]]


def test_a_report_of_format_1_is_read(tmp_path: Path) -> None:
    """And written as one of today's, with what it lacks filled in."""
    old = json.loads(a_report(tmp_path, "a.json", one=1).read_text("utf-8"))
    old["version"] = 1
    del old["environments"], old["tests"][0]["host"], old["tests"][0]["limits"]
    old["baseline"] = {"file": "b.json", "changes": []}
    path, out = tmp_path / "old.json", tmp_path / "new.json"
    path.write_text(json.dumps(old), "utf-8")

    assert 0 == main(["merge", str(path), "--out", str(out)])

    new = json.loads(out.read_text("utf-8"))
    jsonschema.validate(new, json.loads(SCHEMA.read_text("utf-8")))
    assert 2 == new["version"]
    assert ("", []) == (new["tests"][0]["host"], new["tests"][0]["limits"])
    assert {"file": "b.json", "changes": [], "new": [], "stale": []} == new["baseline"]


def _machine(host: str) -> dict[str, Any]:
    words = dict.fromkeys(("python", "platform"), "")
    return {
        **words,
        "host": host,
        "torch": None,
        "backend": "off",
        "driver": None,
        "cards": [],
    }


def test_compare_names_what_is_new_gone_or_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests, limits that hold in one of two reports, and machines that differ."""

    def write(name: str, test: str, measured: int, host: str) -> str:
        path = a_report(tmp_path, name, same=7, **{test: 2**20})
        found = json.loads(path.read_text("utf-8"))
        found["environments"] = [_machine(host)]
        found["tests"][-1]["limits"] = [
            {
                "metric": "allocated",
                "device_index": 0,
                "phase": "call",
                "limit_bytes": 2**20,
                "measured_bytes": measured,
                "held": measured <= 2**20,
            }
        ]
        path.write_text(json.dumps(found), "utf-8")
        return str(path)

    before = write("a.json", "a_gone", 2**20, "left")
    now = write("b.json", "a_new", 2**20 + 1, "right")

    assert 0 == main(["compare", before, now])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("before: host left")
    assert out[1].startswith("now: host right")
    assert "new: a_new (allocated 1 MiB, reserved 1 MiB)" == out[2]
    assert "gone: a_gone (allocated 1 MiB, reserved 1 MiB)" == out[3]
    assert (
        "a limit is broken now: same: allocated on cuda:0, call: "
        "1 MiB of 1 MiB, 1 B too much" == out[4]
    )
    assert 0 == main(["compare", now, before])
    assert "a limit holds again: same" in capsys.readouterr().out


def test_markdown_shows_limits_and_what_is_new_or_stale(tmp_path: Path) -> None:
    """What a reviewer of a pull request must see."""
    found = json.loads(a_report(tmp_path, "a.json", one=3 * 2**20).read_text("utf-8"))
    found["tests"][0]["limits"] = [
        {
            "metric": metric,
            "device_index": None,
            "phase": "test",
            "limit_bytes": 2**20,
            "measured_bytes": measured,
            "held": measured <= 2**20,
        }
        for metric, measured in (("leak", 3 * 2**20), ("allocated", 5))
    ]
    unknown = dict(found["tests"][0]["limits"][1], metric="process", held=False)
    found["tests"][0]["limits"].append(unknown)
    entry = {"environment": "T4", "test": "x", "peaks": {"allocated": 2**20}}
    found["baseline"] = {"file": "b", "changes": [], "new": [entry], "stale": [entry]}

    text = markdown(document.parse(json.dumps(found), "a.json"))

    assert "**0 changes against b, 1 new, 1 stale**" in text
    assert "| stale | peaks | environment |" in text
    assert 2 == text.count("| x | allocated 1 MiB | T4 |")
    assert "**2 of 3 limits broken**" in text
    assert "| process on all cards, test | 1 MiB | 5 B | not known ❌ |" in text
    assert "| one | leak on all cards, test | 1 MiB | 3 MiB | +2 MiB ❌ |" in text


def test_shards_are_merged_and_gated_as_one(
    pytester: pytest.Pytester, capsys: pytest.CaptureFixture[str]
) -> None:
    """A baseline of the whole suite, a run in two jobs, one verdict."""
    pytester.makepyfile(
        test_a="import torch\ndef test_a(): torch.zeros(2**20, device='cuda')",
        test_b="import os, torch\ndef test_b():"
        " torch.zeros(int(os.environ.get('N', 2**20)), device='cuda')",
    )
    options = ("--gpu-backend=simulated", "-p", "no:cacheprovider")
    baseline = ("--gpu-baseline=base.json", "--gpu-update-baseline")
    assert 0 == pytester.runpytest(*options, *baseline).ret
    shards = ["1.json", "2.json"]
    for name, file in zip(shards, ("test_a.py", "test_b.py"), strict=True):
        made = pytester.runpytest(*options, f"--gpu-report=json:{name}", file)
        assert 0 == made.ret

    assert 0 == main(["merge", *shards, "--out", "now.json"])
    assert 0 == main(["compare", "base.json", "now.json", "--fail=allocated:0"])
    tests = json.loads(Path("now.json").read_text("utf-8"))["tests"]
    assert ["test_a.py::test_a", "test_b.py::test_b"] == [
        each["nodeid"] for each in tests
    ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("N", str(2**21))
        pytester.runpytest(*options, "--gpu-report=json:2.json", "test_b.py")
    assert 0 == main(["merge", *shards, "--out", "now.json"])
    capsys.readouterr()
    assert 1 == main(["compare", "base.json", "now.json", "--fail=allocated:0"])
    assert "test_b.py::test_b" in capsys.readouterr().out


def test_two_reports_are_shown_on_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are in it, with the changes that the terminal lists; a baseline cannot be."""
    before = a_report(tmp_path, "before.json", a=2**20, gone=512)
    now = a_report(tmp_path, "now.json", a=2**21, new=512)
    target = tmp_path / "both.html"

    assert 0 == main(["compare", str(before), str(now), "--html", str(target)])

    assert "1 tests changed, 1 new, 1 gone" in capsys.readouterr().out
    text = target.read_text("utf-8")
    assert '<script type="application/json" id="before">' in text
    assert '"file": "before.json"' in text
    baseline = tmp_path / "baseline.json"
    baseline.write_text(Baseline().to_text(), "utf-8")
    assert 1 == main(["compare", str(baseline), str(now), "--html", str(target)])
    assert "--html shows two reports side by side" in capsys.readouterr().err


def test_a_merged_report_counts_the_outcomes_of_all_shards() -> None:
    """As if one run had made them."""
    shards = [
        document.Report((), outcomes={"passed": 2, "failed": 1}),
        document.Report((), outcomes={"passed": 3}),
    ]

    assert {"passed": 5, "failed": 1} == merge(shards).outcomes
    assert "1 failed, 5 passed" in markdown(merge(shards))
