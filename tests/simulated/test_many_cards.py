"""Two to eight cards in one process: budgets, peaks, limits and baselines of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from small_bert import Classifier, logits, save_layered
from versions import SPREADS_EVENLY

from pytest_gpumem import PeakRecorder, simulated_device, vram_budget

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ["pytester"]

MIB = 2**20


COUNTS = pytest.mark.parametrize("count", [2, 4, 8])


def _run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


@COUNTS
def test_every_card_has_its_budget_and_its_peaks(
    count: int, pytester: pytest.Pytester
) -> None:
    """The Nth card may hold so many times 32 MiB, and no other card's matter."""
    pytester.makepyfile(
        f"""
        import pytest
        import torch

        COUNT = {count}
        MIB = 2**20

        def take(mib, card):
            return torch.empty(mib * MIB, dtype=torch.uint8, device=f"cuda:{{card}}")

        def test_it():
            assert torch.cuda.device_count() == COUNT
            kept = []
            for card in range(COUNT):
                allowed = 32 * (card + 1)
                assert torch.cuda.mem_get_info(card)[0] == allowed * MIB
                with pytest.raises(torch.OutOfMemoryError, match=f"GPU {{card}} has"):
                    take(allowed + 2, card)
                kept.append(take(allowed - 2, card))

        @pytest.mark.gpu_budget("24MiB", device=COUNT - 1)
        @pytest.mark.max_vram("4MiB", device=1)
        def test_of_its_own():
            assert torch.cuda.mem_get_info(COUNT - 1)[0] == 24 * MIB
            assert torch.cuda.mem_get_info(0)[0] == 32 * MIB
            take(6, 0), take(4, 1), take(6, COUNT - 1) if COUNT > 2 else None

        @pytest.mark.max_vram("4MiB", device=1)
        @pytest.mark.max_vram("40MiB")
        def test_over_on_the_second():
            take(20, 0), take(6, 1)
        """
    )
    budgets = ",".join(f"{card}={32 * (card + 1)}MiB" for card in range(count))
    result = _run(
        pytester,
        f"--gpu-card=T4*{count}",
        f"--gpu-budget={budgets}",
        "--gpu-values=none",
        "--gpu-report=json:report.json",
    )

    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        ["peak VRAM above max_vram: allocated 6 MiB (* bytes) on cuda:1, limit 4 MiB *"]
    )
    report = json.loads((pytester.path / "report.json").read_text(encoding="utf-8"))
    (test,) = (each for each in report["tests"] if each["nodeid"].endswith("::test_it"))
    peaks = {
        each["device_index"]: each["peak_allocated_bytes"]
        for each in test["figures"]
        if each["phase"] == "call"
    }
    assert {card: (32 * card + 30) * MIB for card in range(count)} == peaks


def test_a_baseline_keeps_every_card(pytester: pytest.Pytester) -> None:
    """The card that needs more is named, and no other."""
    test = """
        import torch

        def test_it():
            for card in range(8):
                mib = 4 * (card + 1) + ({more} if card == 5 else 0)
                torch.empty(mib * 2**20, dtype=torch.uint8, device=f"cuda:{{card}}")
        """
    options = ("--gpu-card=T4*8", "--gpu-values=none", "--gpu-baseline=peaks.json")
    pytester.makepyfile(test_it=test.format(more=0))
    written = _run(pytester, *options, "--gpu-update-baseline")
    pytester.makepyfile(test_it=test.format(more=10))
    grown = _run(pytester, *options)

    written.assert_outcomes(passed=1)
    grown.assert_outcomes(failed=1)
    grown.stdout.fnmatch_lines(["VRAM growth above the baseline *cuda:5 allocated*"])
    said = (
        grown.stdout.str().partition("VRAM growth above")[2].partition("allowed is")[0]
    )
    assert "cuda:4" not in said
    assert "cuda:6" not in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 34 MiB as a checkpoint."""
    folder = tmp_path_factory.mktemp("many")
    save_layered(folder)
    return folder


@COUNTS
def test_a_model_is_split_over_all_cards(
    count: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each card's peak is less than the whole, and the answer is the CPU's.

    How many of them accelerate uses is its own affair.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    wanted = logits(Classifier.from_pretrained(folder), "cpu")
    with simulated_device(f"16GiB,cc=8.0*{count}"):
        recorders = [PeakRecorder(device_index=card) for card in range(count)]
        for recorder in recorders:
            recorder.__enter__()
        model = Classifier.from_pretrained(folder, device_map="balanced")
        answer = logits(model, "cuda:0")
        held = [torch.cuda.memory_allocated(card) for card in range(count)]
        for recorder in recorders:
            recorder.__exit__(None, None, None)
        weights = sum(each.numel() * each.element_size() for each in model.parameters())
        places = set(model.hf_device_map.values())

    assert places <= set(range(count))
    assert len(places) > count // 2
    assert torch.equal(wanted, answer)
    assert weights <= sum(held) < 1.1 * weights
    for each, now in zip(recorders, held, strict=True):
        assert now <= each.figures.peak_allocated_bytes < weights


def test_budgets_of_the_cards_are_what_auto_plans_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow card gets little, the host the rest; no card goes beyond its own."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    wanted = logits(Classifier.from_pretrained(folder), "cpu")
    with (
        simulated_device("16GiB,cc=8.0*3"),
        vram_budget("22MiB", device_index=0),
        vram_budget("24MiB", device_index=1),
        vram_budget("2MiB", device_index=2),
    ):
        model = Classifier.from_pretrained(folder, device_map="auto")
        answer = logits(model, "cuda:0")
        peaks = [torch.cuda.max_memory_reserved(card) for card in range(3)]
        places = {str(each) for each in model.hf_device_map.values()}

    assert torch.equal(wanted, answer)
    assert ({"0", "1", "cpu"} if SPREADS_EVENLY else {"0", "1"}) <= places
    for peak, mib in zip(peaks, (22, 24, 2), strict=True):
        assert peak <= mib * MIB
