"""bert-large at its real size, against recordings of PyTorch's real allocator."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem.cards import find_card
from pytest_gpumem.checkpoints import make_checkpoint
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine

RECORDING = Path(__file__).parent / "recordings" / "bert_large_allocator.json"
ALL = json.loads(RECORDING.read_text(encoding="utf-8"))["cases"]
CASES = [case for case in ALL if case["case"]["phase"] == "load"]
FORWARDS = [case for case in ALL if case["case"]["phase"] == "infer"]
TRAININGS = [case for case in ALL if case["case"]["phase"] == "train"]
#: What a phase's figures show.
FIGURES = {
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
    "peak_allocated": "allocated_bytes.all.peak",
    "peak_reserved": "reserved_bytes.all.peak",
    "requested": "requested_bytes.all.current",
    "segments": "segment.all.current",
}
#: Figures that are not exact, and by how much they may differ: from the second
#: optimiser step in fp32 with eager attention on, one segment more is reserved.
INEXACT = 0.003
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def _name(case: dict[str, Any]) -> str:
    return " ".join(str(value) for value in case["case"].values())


def _total(case: dict[str, Any]) -> int:
    total = case["case"].get("total", 16 * 2**30)
    return total if isinstance(total, int) else int(total[:-1]) * 2**30


def _load(path: Path, case: dict[str, Any]) -> Any:
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415  # slow

    load = AutoModelForSequenceClassification.from_pretrained
    dtype = DTYPES[case["case"]["dtype"]]
    if case["case"]["load"] == "to":
        return load(path, dtype=dtype).to("cuda")
    return load(path, dtype=dtype, device_map="cuda:0")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Models go at the end of each test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def path() -> Path:
    """The checkpoint."""
    return make_checkpoint("bert-large")


def test_the_recording_is_whole() -> None:
    """Both ways to load, both dtypes, and the cards that are too small."""
    assert 8 == len(CASES)


@pytest.mark.parametrize(
    "case", [case for case in CASES if "load" in case["result"]], ids=_name
)
def test_a_load_takes_exactly_the_recorded_bytes(
    path: Path, case: dict[str, Any]
) -> None:
    """Every figure of the recording is met to the byte."""
    with simulated_device(find_card(f"{_total(case)},cc=8.0")) as machine:
        model = _load(path, case)
        stats = machine.cards[0].memory_stats()

    recorded = dict(case["result"]["load"])
    assert 335143938 == model.num_parameters() == case["result"]["n_params"]
    assert recorded == {
        "allocated": stats["allocated_bytes.all.current"],
        "reserved": stats["reserved_bytes.all.current"],
        "peak_allocated": stats["allocated_bytes.all.peak"],
        "peak_reserved": stats["reserved_bytes.all.peak"],
        "requested": stats["requested_bytes.all.current"],
        "peak_requested": stats["requested_bytes.all.peak"],
        "active": stats["active_bytes.all.current"],
        "inactive_split": stats["inactive_split_bytes.all.current"],
        "segments": stats["segment.all.current"],
        "device_allocs": stats["num_device_alloc"],
        "device_frees": stats["num_device_free"],
        "retries": stats["num_alloc_retries"],
    }


def test_a_card_too_small_ends_in_the_recorded_oom(path: Path) -> None:
    """On 1 GiB the move fails at the same parameter, with the same text."""
    (case,) = (case for case in CASES if "oom" in case["result"])

    with (
        simulated_device("1GiB,cc=8.0"),
        pytest.raises(torch.OutOfMemoryError) as caught,
    ):
        _load(path, case)

    assert case["result"]["oom"] == str(caught.value)


def test_the_loaders_own_failure_on_a_small_card_is_shown(path: Path) -> None:
    """Transformers asks for a negative warm-up on a card of 1 GiB."""
    (case,) = (case for case in CASES if "error" in case["result"])

    with simulated_device("1GiB,cc=8.0"), pytest.raises(RuntimeError) as caught:
        _load(path, case)

    assert case["result"]["error"].startswith("RuntimeError: Trying to create tensor")
    assert str(caught.value) in case["result"]["error"]


@pytest.mark.parametrize("case", FORWARDS, ids=_name)
def test_a_forward_takes_exactly_the_recorded_bytes(
    path: Path, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes of 8 x 128 tokens, cuBLAS's workspace included, to the byte.

    In fp16, which a CPU is slow at, without values; see the trainings below.
    """
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415  # slow

    values = "computed"
    if case["case"]["dtype"] == "fp16":
        values = "none"
        monkeypatch.setattr(
            "transformers.masking_utils._ignore_bidirectional_mask_sdpa",
            lambda *_args, **_options: True,
        )
    device = simulated_device("16GiB,cc=8.0", values=values)
    with device as machine, torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(
            path,
            dtype=DTYPES[case["case"]["dtype"]],
            attn_implementation=case["case"]["attn"],
        ).to("cuda")
        tokens = torch.ones(8, 128, dtype=torch.int64).cuda()
        mask = torch.ones(8, 128, dtype=torch.int64).cuda()
        labels = torch.ones(8, dtype=torch.int64).cuda()
        result = None
        for phase in ("inputs", "forward_1", "forward_2"):
            if phase != "inputs":
                result = model(tokens, attention_mask=mask).logits
            stats = machine.cards[0].memory_stats()
            torch.cuda.reset_peak_memory_stats()
            figures = {name: stats[key] for name, key in FIGURES.items()}
            recorded = case["result"][phase]
            assert {name: recorded[name] for name in figures} == figures, phase

    assert result is not None
    assert labels.is_cuda


def _train(
    path: Path, case: dict[str, Any], machine: SimulatedMachine
) -> dict[str, Any]:
    """Train as the recording did; return the figures by phase, and the OOM's text."""
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415  # slow

    settings = case["case"]
    seen: dict[str, Any] = {}

    def note(phase: str) -> None:
        stats = machine.cards[0].memory_stats()
        seen[phase] = {name: stats[key] for name, key in FIGURES.items()}
        torch.cuda.reset_peak_memory_stats()

    load: Any = AutoModelForSequenceClassification.from_pretrained
    model = load(
        path,
        dtype=DTYPES[settings["dtype"]],
        attn_implementation=settings["attn"],
    ).to("cuda")
    note("load")
    tokens = torch.ones(8, 128, dtype=torch.int64).cuda()
    masked = settings.get("mask") != "none"
    mask = torch.ones(8, 128, dtype=torch.int64).cuda() if masked else None
    labels = torch.ones(8, dtype=torch.int64).cuda()
    note("inputs")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    try:
        for step in range(1, 4):
            output = model(tokens, attention_mask=mask, labels=labels)
            note(f"forward_{step}")
            output.loss.backward()
            note(f"backward_{step}")
            optimizer.step()
            note(f"step_{step}")
            optimizer.zero_grad()
            note(f"zero_grad_{step}")
    except torch.OutOfMemoryError as error:
        seen["oom"] = str(error)
    return seen


@pytest.mark.parametrize("case", TRAININGS, ids=_name)
def test_a_training_takes_the_recorded_bytes(
    path: Path, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of AdamW: every figure, and the text of an OOM, to the byte.

    No values are computed, so what depends on them is said: the mask hides nothing.
    """
    monkeypatch.setattr(
        "transformers.masking_utils._ignore_bidirectional_mask_sdpa",
        lambda *_args, **_options: True,
    )
    card = find_card(f"{_total(case)},cc={case['case'].get('cc', '8.0')}")
    with simulated_device(card, values="none") as machine:
        seen = _train(path, case, machine)

    recorded = case["result"]
    assert recorded.get("oom") == seen.pop("oom", None)
    late = ("step_2", "zero_grad_2", "forward_3", "backward_3", "step_3", "zero_grad_3")
    for phase, figures in seen.items():
        for name, value in figures.items():
            slack = 0.0
            if phase in late and name in ("reserved", "peak_reserved", "segments"):
                slack = INEXACT
            expected = recorded[phase][name]
            assert abs(value - expected) <= slack * expected, (phase, name)


@pytest.mark.parametrize("where", ["cuda", "cuda:0", 0, "auto"])
def test_every_spelling_of_the_map_computes_the_cpus_numbers(
    path: Path, where: object
) -> None:
    """device_map as name, index or "auto" loads onto the card; logits are equal."""
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415  # slow

    load = AutoModelForSequenceClassification.from_pretrained
    tokens = torch.arange(1000, 1032)[None]
    with simulated_device("A100-40GB"), torch.no_grad():
        expected = load(path)(tokens).logits
        model = load(path, device_map=where)
        logits = model(tokens.to("cuda")).logits

        assert {"cuda:0"} == {str(p.device) for p in model.parameters()}
        assert torch.equal(expected, logits.cpu())


def test_auto_plans_for_the_budget_and_offloads_the_rest(path: Path) -> None:
    """Under 1 GiB the map spreads the model; results are equal, the peak keeps to it."""
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415  # slow

    from pytest_gpumem import PeakRecorder, vram_budget  # noqa: PLC0415  # torch is here

    load = AutoModelForSequenceClassification.from_pretrained
    tokens = torch.arange(1000, 1032)[None]
    with simulated_device("A100-40GB"), torch.no_grad():
        expected = load(path)(tokens).logits
        with vram_budget("1GiB"), PeakRecorder() as recorder:
            model = load(path, device_map="auto")
            logits = model(tokens.to("cuda")).logits

        assert {"0", "cpu"} == {str(place) for place in model.hf_device_map.values()}
        assert torch.equal(expected, logits.cpu())
        assert recorder.figures.peak_reserved_bytes <= 2**30
