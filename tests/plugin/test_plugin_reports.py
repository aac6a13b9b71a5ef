"""Reports of a run, with workers and without."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch  # an inner run would import it anew, which torch does not survive
from inner_tests import SWEEP_AND_FALLBACK
from pages import Page
from ways import WAYS, each_way

from pytest_gpumem.baselines.baseline import Baseline
from pytest_gpumem.cards import find_card
from pytest_gpumem.reports import page as page_module  # an inner run keeps it

pytest_plugins = ["pytester"]

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"
T4 = "Tesla T4, simulated, torch " + ".".join(torch.__version__.split(".")[:2])
T4_BYTES = find_card("T4")[0].total_bytes
TESTS = (
    """
    import gc
    import pytest
    import torch

    gc.freeze()  # a worker is a process of its own: let no collection search all of torch

    @pytest.fixture(scope="module")
    def table():
        return torch.zeros(2**18, device="cuda")

    def test_peak(table):
        kept = [torch.zeros(2**18, device="cuda") for _ in range(3)]
        del kept[0]

    @pytest.mark.gpu_budget("64MiB")
    @pytest.mark.parametrize("text", ["</script><script>alert(1)</script>", "a|b'\\"`"])
    def test_text(text):
        torch.zeros(1024, device="cuda")
"""
    + SWEEP_AND_FALLBACK
    + """
    def test_no_card():
        pass
"""
)
LIMITS = """
    import pytest
    import torch

    @pytest.mark.max_vram("1MiB")
    @pytest.mark.max_vram("50%", metric="reserved", phase="test")
    @pytest.mark.max_vram_leak("1KiB")
    def test_over():
        torch.zeros(2**20, device="cuda")

    @pytest.mark.max_vram("1MiB")
    def test_under():
        torch.zeros(2**18, device="cuda")

    @pytest.mark.max_vram_leak("1KiB")
    def test_leak():
        torch.zeros(2**18, device="cuda")

    @pytest.mark.max_vram("1MiB")
    def test_limit_without_card():
        pass
"""


@pytest.mark.parametrize("way", each_way("both"))
def test_every_kind_is_written_in_every_way(
    way: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON by its schema, a page that no test's name breaks, Markdown, a summary."""
    Baseline(
        {
            T4: {
                "test_bounds.py::test_under": {"allocated": 2**19, "reserved": 2**21},
                "test_it.py::test_gone": {"allocated": 7},
            }
        }
    ).write(pytester.path / "b.json")
    summary = pytester.path / "summary.md"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    pytester.makepyfile(test_it=TESTS, test_bounds=LIMITS)

    done = pytester.runpytest(
        "-p",
        "no:cacheprovider",
        *(f"--gpu-report={kind}:out/r.{kind}" for kind in ("json", "html", "md")),
        "--gpu-baseline=b.json",
        "--gpu-compare-fail=allocated:0%",
        "--gpu-card=T4",
        "--gpu-budget=4GiB",
        *WAYS[way],
    )

    counts = done.parseoutcomes()
    assert 2 == counts["failed"]
    done.stdout.fnmatch_lines(
        [f"{kind} report: out/r.{kind}" for kind in ("json", "html", "md")]
    )
    folder = pytester.path / "out"
    report = json.loads((folder / "r.json").read_text("utf-8"))
    jsonschema.validate(report, json.loads(SCHEMA.read_text("utf-8")))
    tests = {each["nodeid"].partition("::")[2]: each for each in report["tests"]}
    assert not {"test_no_card", "test_limit_without_card"} & set(tests)
    _check_machine(report)
    _check_limits(tests)
    assert report["baseline"]["file"] == "b.json"
    assert counts["failed"] == report["outcomes"]["failed"]
    assert counts["passed"] == report["outcomes"]["passed"]
    changes = {each["metric"]: each for each in report["baseline"]["changes"]}
    assert {"allocated"} == set(changes)
    assert changes["allocated"]["is_regression"]
    assert {"test_it.py::test_gone"} == {
        each["test"] for each in report["baseline"]["stale"]
    }
    assert {"test_it.py::test_peak"} < {
        each["test"] for each in report["baseline"]["new"]
    }
    _check_peak(tests["test_peak"], is_alone="-n" not in WAYS[way])
    over = tests["test_over"]
    assert "failed" == over["outcome"]
    assert "limit 1 MiB" in over["broken_limit"]
    sweeps = [each["sweeps"][0] for name, each in tests.items() if "sweep" in name]
    assert 2 == sum(each["points"] for each in sweeps)
    assert {"recovered"} == {
        name for each in sweeps for row in each["sites"] for name in row["verdicts"]
    }
    steps = tests["test_fallback"]["fallbacks"][0]
    assert "cuda:0 float32" == steps[0]["rung"]
    budgets = {
        each["timeline"][0]["budget_bytes"]
        for name, each in tests.items()
        if name.startswith("test_text")
    }
    assert {64 * 2**20} == budgets

    if "--junitxml=junit.xml" in WAYS[way]:
        junit = (pytester.path / "junit.xml").read_text("utf-8")
        assert 'name="gpumem.limits"' in junit
        assert "gpumem.timeline" not in junit

    page = Page((folder / "r.html").read_text("utf-8"))
    assert 2 == len(page.scripts)
    assert report == json.loads(page.scripts[0])
    assert [] == page.loads

    text = (folder / "r.md").read_text("utf-8")
    assert "<script" not in text
    assert "a&#124;b" in text
    assert f"before\n{text}" == summary.read_text("utf-8")


def _check_machine(report: dict[str, Any]) -> None:
    (machine,) = report["environments"]
    assert platform.node() == machine["host"]
    assert torch.__version__ == machine["torch"]
    assert ("simulated", None) == (machine["backend"], machine["driver"])
    (card,) = machine["cards"]
    assert ("Tesla T4", 4 * 2**30) == (card["name"], card["budget_bytes"])
    assert {platform.node()} == {each["host"] for each in report["tests"]}


def _check_limits(tests: dict[str, Any]) -> None:
    over, under, leak = (
        tests[name]["limits"] for name in ("test_over", "test_under", "test_leak")
    )
    figures = tests["test_over"]["figures"]
    reserved = max(each["peak_reserved_bytes"] for each in figures)
    assert {
        ("allocated", 0, "call", 2**20, 4 * 2**20, False),
        ("reserved", 0, "test", T4_BYTES // 2, reserved, True),
    } == {tuple(each.values()) for each in over}
    assert [("allocated", 0, "call", 2**20, 2**20, True)] == [
        tuple(each.values()) for each in under
    ]
    assert [("leak", None, "test", 1024, 0, True)] == [
        tuple(each.values()) for each in leak
    ]


def _check_peak(test: dict[str, Any], *, is_alone: bool) -> None:
    call = next(each for each in test["figures"] if each["phase"] == "call")
    (card,) = test["timeline"]
    assert call["peak_allocated_bytes"] == card["peak_bytes"] == 4 * 2**20
    assert card["peak_bytes"] == sum(each["bytes"] for each in card["live_at_peak"])
    assert card["peak_bytes"] == max(point[1] for point in card["points"])
    assert any("test_it.py:12 in" in each["site"] for each in card["live_at_peak"])
    if is_alone:
        table = {"scope": "module", "name": "table", "bytes": 2**20}
        assert [table] == test["fixtures"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "pdf:r.pdf",
            "*--gpu-report: 'pdf:r.pdf' is not a report; accepted are json:PATH*",
        ),
        ("json:", "*--gpu-report: 'json:' is not a report*"),
        (
            "json:test_it.py/r.json",
            "*--gpu-report: *cannot be written: *is not a folder*",
        ),
        ("md:.", "*cannot be written: it is a folder; name a file in it*"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_test(
    value: str, message: str, pytester: pytest.Pytester
) -> None:
    """Exit code 4, and the option's name."""
    pytester.makepyfile(test_it="def test_it(): raise AssertionError")

    done = pytester.runpytest("-p", "no:cacheprovider", f"--gpu-report={value}")

    assert pytest.ExitCode.USAGE_ERROR == done.ret
    done.stderr.fnmatch_lines([message])


def test_a_page_without_jinja2_names_what_to_install(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any test; the other kinds do without it."""
    monkeypatch.setattr(page_module, "find_spec", lambda _name: None)
    pytester.makepyfile(test_it="def test_it(): pass")

    page = pytester.runpytest("-p", "no:cacheprovider", "--gpu-report=html:r.html")
    other = pytester.runpytest("-p", "no:cacheprovider", "--gpu-report=md:r.md")

    assert pytest.ExitCode.USAGE_ERROR == page.ret
    page.stderr.fnmatch_lines(["*pip install pytest-gpumem?report?*"])
    other.assert_outcomes(passed=1)


def test_a_step_summary_that_cannot_be_written_fails_nothing(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line says so; nor is anything said of a run that uses no card."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "none" / "s.md"))
    pytester.makepyfile(
        test_it="import torch\ndef test_it(): torch.zeros(1, device='cuda')",
        test_other="def test_other(): pass",
    )

    done = pytester.runpytest("-p", "no:cacheprovider", "test_it.py")
    other = pytester.runpytest("-p", "no:cacheprovider", "test_other.py")
    other.stdout.no_fnmatch_line("*GITHUB_STEP_SUMMARY*")

    assert pytest.ExitCode.OK == done.ret
    done.stdout.fnmatch_lines(["GITHUB_STEP_SUMMARY: *cannot be written*"])


def test_a_report_says_what_an_update_changed(pytester: pytest.Pytester) -> None:
    """Against the file as it was: nothing of that is a regression."""
    known = {"test_it.py::test_it": {"allocated": 7}, "test_gone.py::test": {}}
    Baseline({T4: known}).write(pytester.path / "b.json")
    pytester.makepyfile(
        test_it="""
        import torch

        def test_it(): torch.zeros(1, device="cuda")
        def test_new(): torch.zeros(1, device="cuda")
        """
    )

    done = pytester.runpytest(
        "-p",
        "no:cacheprovider",
        "--gpu-baseline=b.json",
        "--gpu-update-baseline",
        "--gpu-report=json:r.json",
        "--gpu-report=md:r.md",
    )

    done.assert_outcomes(passed=2)
    report = json.loads((pytester.path / "r.json").read_text("utf-8"))
    jsonschema.validate(report, json.loads(SCHEMA.read_text("utf-8")))
    (change,) = report["baseline"]["changes"]
    assert (7, 512, False) == (change["before"], change["now"], change["is_regression"])
    (new,), (stale,) = report["baseline"]["new"], report["baseline"]["stale"]
    assert ("test_it.py::test_new", 512) == (new["test"], new["peaks"]["allocated"])
    assert ("test_gone.py::test", T4) == (stale["test"], stale["environment"])
    text = (pytester.path / "r.md").read_text("utf-8")
    assert "**1 change against b.json, 1 new, 1 stale**" in text


def test_the_terminal_says_what_the_peaks_are_made_of(
    pytester: pytest.Pytester,
) -> None:
    """With -v and a report; not otherwise, as kinds are not recorded."""
    pytester.makepyfile(
        """
        import torch

        def test_forward():
            model = torch.nn.Linear(256, 512).cuda()
            model(torch.ones(128, 256, device="cuda"))
        """
    )
    options = ("-p", "no:cacheprovider", "--gpu-card=T4")

    told = pytester.runpytest("-v", "--gpu-report=md:r.md", *options)
    plain = pytester.runpytest("-v", *options)

    told.stdout.fnmatch_lines(
        [
            "allocated at the peak, by kind:",
            "  *::test_forward: workspaces 8.13 MiB, weights 514 KiB, activations 256 KiB, "
            "unnamed 128 KiB",
        ]
    )
    plain.stdout.no_fnmatch_line("*by kind*")
