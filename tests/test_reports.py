"""Reports without a run: the document, Markdown, the timeline, the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pytest_gpumem
from pytest_gpumem import simulated_device
from pytest_gpumem.baselines.baseline import Baseline
from pytest_gpumem.cli import main
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.errors import ReportError
from pytest_gpumem.instruments.timeline import MAX_GROUPS, MAX_POINTS, Series, Timeline
from pytest_gpumem.model.records import MemoryFigures, to_properties
from pytest_gpumem.reports import document
from pytest_gpumem.reports.markdown import escape, markdown

PACKAGE = Path(pytest_gpumem.__file__).parent


def a_report(tmp_path: Path, name: str, **peaks: int) -> Path:
    """Write a report of tests with these peaks."""
    tests = []
    for test, nbytes in peaks.items():
        figures = MemoryFigures(0, nbytes, nbytes, nbytes, nbytes, 0, 0, 0, 0, 0)
        properties = [("gpumem.environment", "T4"), *to_properties("call", figures)]
        tests.append(document.test_record(test, "passed", 0.1, properties))
    path = tmp_path / name
    found = [each for each in tests if each is not None]
    path.write_text(document.to_text(document.document(name, found, None)), "utf-8")
    return path


def test_the_published_schema_is_the_shipped_one() -> None:
    """Otherwise: copy pytest_gpumem/reports/report.schema.json to docs."""
    shipped = PACKAGE / "reports" / "report.schema.json"
    published = Path(__file__).parents[1] / "docs" / "report.schema.json"
    assert shipped.read_text("utf-8") == published.read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "is no report"),
        ('{"format": "pytest-gpumem report", "version": 9}', "upgrade it"),
        ('{"format": "pytest-gpumem report", "version": 1}', "is damaged"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    """The error says what is wrong."""
    with pytest.raises(ReportError, match=message):
        document.parse(text, "r.json")


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    """What is written is read."""
    path = a_report(tmp_path, "a.json", one=1, two=2)
    report = document.read(path)
    assert document.to_text(report) == path.read_text("utf-8")
    assert ["one", "two"] == [each["nodeid"] for each in report["tests"]]


def test_markdown_shows_the_largest_and_counts_the_others(tmp_path: Path) -> None:
    """And its cells hold nothing that means more than itself."""
    peaks = {f"test_{number}": number * 2**20 for number in range(1, 31)}
    text = markdown(document.read(a_report(tmp_path, "a.json", **peaks)))
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
    import torch  # noqa: PLC0415  # the device is simulated from here on

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
    assert "is no JSON" in capsys.readouterr().err


def test_merge_joins_reports_and_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not one of each."""
    a, b = a_report(tmp_path, "a", one=1, two=2), a_report(tmp_path, "b", two=3)
    out = tmp_path / "out"
    assert 0 == main(["merge", str(a), str(b), "--out", str(out)])
    tests = document.read(out)["tests"]
    peaks = {
        each["nodeid"]: each["figures"][0]["peak_allocated_bytes"] for each in tests
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


def test_merging_keeps_what_the_baseline_said() -> None:
    """Each change once, by test and metric."""

    def one(now: int) -> dict[str, Any]:
        change = {"test": "t", "metric": "allocated", "before": 1, "now": now}
        baseline = {"file": "b.json", "changes": [{**change, "is_regression": True}]}
        return document.document("run", [], baseline)

    merged = json.loads(document.to_text(document.merge([one(2), one(3)])))
    assert [3] == [each["now"] for each in merged["baseline"]["changes"]]
    assert ["run"] == merged["runs"]
