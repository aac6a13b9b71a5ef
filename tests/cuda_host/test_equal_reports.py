"""A suite's report is the same on PyTorch's own CUDA code and on the simulated card."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from equal import Run, differences, run

if TYPE_CHECKING:
    from pathlib import Path


def _both(suite: str, folder: Path, *options: str, **variables: str) -> list[Run]:
    """Run a suite on both, and hold everything that they report equal."""
    real, simulated = (
        run(suite, backend, folder / backend, *options, **variables)
        for backend in ("cuda", "simulated")
    )
    assert [] == differences(real.tests, simulated.tests), real.text
    assert real.baseline == simulated.baseline
    assert simulated.code == real.code, real.text + simulated.text
    return [real, simulated]


def _outcomes(tests: dict[str, Any], outcome: str) -> set[str]:
    return {
        nodeid.partition("::")[2]
        for nodeid, test in tests.items()
        if outcome == test["outcome"]
    }


def test_sizes_models_limits_budgets_injection_threads_sweeps(tmp_path: Path) -> None:
    """Every figure, limit, verdict and incident, on two cards; and the snapshots."""
    runs = _both("usual.py", tmp_path, "--gpu-snapshots=snapshots")

    tests = runs[0].tests
    assert {
        "test_over_its_budget",
        "test_nobody_catches_it",
        "test_over_its_limit",
    } == _outcomes(tests, "failed")
    assert {
        "TestOfOneFixture::test_over_its_limit_by_its_fixture",
        "test_it_leaks",
    } == _outcomes(tests, "error")
    assert 25 <= len(_outcomes(tests, "passed"))
    # A broken limit has no moment, and so no snapshot, on a real card.
    names = {"test_over_its_budget", "test_nobody_catches_it"}
    for name in names:
        real, simulated = (_segments(each.folder / "snapshots", name) for each in runs)
        assert real
        assert simulated == real


def _segments(folder: Path, test: str) -> list[Any]:
    """Return a snapshot's segments: card, bytes, and the blocks' bytes and states."""
    (file,) = folder.glob(f"*{test}*")
    snapshot = pickle.loads(file.read_bytes())  # of this test's own making
    return [
        (
            segment["device"],
            segment["total_size"],
            [(block["size"], block["state"]) for block in segment["blocks"]],
        )
        for segment in snapshot["segments"]
    ]


def test_loads_under_budgets_and_faults(tmp_path: Path) -> None:
    """Of transformers: onto the card, in half, ``auto``, swept, and a ladder."""
    real, _simulated = _both("loads.py", tmp_path, "--gpu-budget=1GiB")

    assert 8 == len(_outcomes(real.tests, "passed")), real.text


def test_timelines(tmp_path: Path) -> None:
    """The same peak, and the same weights and lines that were live at it."""
    real, simulated = _both("timelines.py", tmp_path)

    assert 4 == len(real.timelines), real.text
    assert simulated.timelines.keys() == real.timelines.keys()
    for test, (card,) in real.timelines.items():
        (other,) = simulated.timelines[test]
        assert other["peak_bytes"] == card["peak_bytes"], test
        assert other["points"][-1][1:] == card["points"][-1][1:], test
        assert _weights(other) == _weights(card), test
    (card,) = real.timelines["test_a_peak_by_lines"]
    sites = [each["site"] for each in card["live_at_peak"]]
    assert sites == [
        "timelines.py:18 in test_a_peak_by_lines (other)",
        "timelines.py:19 in test_a_peak_by_lines (other)",
    ]


def _weights(card: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that are a model's, by name."""
    return {
        each["site"]: each["bytes"]
        for each in card["live_at_peak"]
        if " of " in each["site"]
    }


def test_who_shares_a_card(tmp_path: Path) -> None:
    """A context, a tenant, children and their budget, as the driver counts them."""
    real, _simulated = _both("sharing.py", tmp_path)

    failed = {"test_with_its_context", "test_a_child"}
    assert failed == _outcomes(real.tests, "failed"), real.text


def test_workers_share_the_cards(tmp_path: Path) -> None:
    """Tests that need half a card and more wait for each other, and all pass."""
    real, _simulated = _both(
        "sharing.py", tmp_path, "-n2", "-k", "one_at_a_time or beside_each_other"
    )

    assert 8 == len(_outcomes(real.tests, "passed")), real.text


@pytest.mark.parametrize("settings", ["", "expandable_segments:True"])
def test_a_baseline(tmp_path: Path, settings: str) -> None:
    """Written, held, and broken by the test that grows; the same on both."""
    variables = {"PYTORCH_ALLOC_CONF": settings} if settings else {}
    options = ("--gpu-baseline=baseline.json", "--gpu-compare-fail=allocated:0%")
    written = _both(
        "growing.py", tmp_path, *options[:1], "--gpu-update-baseline", **variables
    )
    entries = [
        list(json.loads((each.folder / "baseline.json").read_text()).values())
        for each in written
    ]
    grown = _both("growing.py", tmp_path, *options, GROWN="1", **variables)

    assert [] == differences(*(_figures(each) for each in entries))
    assert {"test_it_grows"} == _outcomes(grown[0].tests, "failed"), grown[0].text


def _figures(value: Any) -> Any:
    """Return a baseline's content without the names of its cards."""
    if isinstance(value, dict):
        return {
            "a card" if "torch" in key else key: _figures(each)
            for key, each in value.items()
        }
    return [_figures(each) for each in value] if isinstance(value, list) else value


def test_an_injected_rule_and_a_sweep_for_all(tmp_path: Path) -> None:
    """Rules of the command line, and the smallest budget that each test passes with."""
    real, _simulated = _both(
        "growing.py", tmp_path / "rule", "--gpu-inject-oom=any:nth=1,min=6MiB"
    )
    found, simulated = _both("growing.py", tmp_path / "budget", "--gpu-suggest=budgets")

    assert {"test_it_grows"} == _outcomes(real.tests, "failed"), real.text
    lines = [
        [line for line in each.text.splitlines() if "growing.py::" in line]
        for each in (found, simulated)
    ]
    assert lines[0]
    assert lines[1] == lines[0]
