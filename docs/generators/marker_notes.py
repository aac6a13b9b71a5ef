"""Additions to the markers' descriptions: their arguments, and an example of each."""

from __future__ import annotations

from typing import Final, NamedTuple

from generators.docstrings import read
from pytest_gpumem.sweeps.plan import SweepPlan

SIZE: Final = "`4GiB`, `4GB`, `50%` of the card, or bytes as a number; inclusive"


class Note(NamedTuple):
    """The description of a marker.

    Attributes:
        arguments: The meaning of each.
        example: A test file that passes on a machine without a GPU.
    """

    arguments: dict[str, str]
    example: str


_SWEEP: Final = dict(read(SweepPlan).entries("Attributes"))

NOTES: Final = {
    "gpu": Note(
        {},
        """
import pytest
import torch


@pytest.mark.gpu
def test_a_real_card_is_there():
    assert torch.cuda.is_available()
""",
    ),
    "gpu_budget": Note(
        {
            "size": f"of the card: {SIZE}",
            "device": "the card's index",
            "host": "bytes that the test may add to [the host's memory]"
            "(../host-memory.md), such as `8GiB`; `None` means any",
        },
        """
import pytest
import torch


@pytest.mark.gpu_budget("64MiB")
def test_more_does_not_fit():
    with pytest.raises(torch.OutOfMemoryError, match="64.00 MiB allowed"):
        torch.empty(65 * 2**20, dtype=torch.uint8, device="cuda")
""",
    ),
    "requires_vram": Note(
        {"size": SIZE, "device": "the card's index"},
        """
import pytest
import torch


@pytest.mark.requires_vram("6GiB")
def test_it_waits_for_its_bytes():
    torch.ones(3, device="cuda")
""",
    ),
    "gpu_exclusive": Note(
        {"device": "the card's index; `None` means each card"},
        """
import pytest
import torch


@pytest.mark.gpu_exclusive
def test_it_may_take_what_is_free():
    free, _total = torch.cuda.mem_get_info()
    torch.empty(free // 4, dtype=torch.uint8, device="cuda")
""",
    ),
    "gpu_isolated": Note(
        {},
        """
import pytest
import torch

CACHE = []  # as a library keeps one


@pytest.mark.gpu_isolated
def test_what_it_keeps_is_not_the_next_tests():
    CACHE.append(torch.ones(3, device="cuda"))
""",
    ),
    "max_vram": Note(
        {
            "limit": SIZE,
            "metric": "`allocated` (bytes in live tensors), `reserved` (bytes that the "
            "allocator holds of the card), `process` (bytes that [the driver "
            "counts](../process-bytes.md) for the process), or on a simulated card "
            "`fragmented` (reserved and not allocated bytes) or `activations` ([one "
            "kind](../reports.md#peaks-by-kind) of the allocated bytes), both at the moment "
            "of the allocated peak",
            "device": "the card's index; `None` means each card",
            "phase": "`call`, `test` (setup and teardown too) or `children` (each process "
            "that the test starts)",
        },
        """
import pytest
import torch


@pytest.mark.max_vram("8MiB")
@pytest.mark.max_vram("32MiB", metric="reserved")
def test_it_is_small():
    torch.ones(2**20, device="cuda")
""",
    ),
    "max_vram_leak": Note(
        {
            "size": "bytes that may be left, as a number or as text; 0 allows nothing. "
            "With `repeat`, bytes that each run may add",
            "repeat": "how often the body is run after the warm-up, with the same "
            "fixtures, at least 3; `None` runs it once and judges the bytes that it leaves",
            "warmup": "the number of runs before, which may leave bytes, such as a cache",
        },
        """
import pytest
import torch

CACHE = {}


@pytest.mark.max_vram_leak("4MiB")
def test_its_cache_is_small():
    CACHE["large"] = torch.ones(2**20, device="cuda")


@pytest.mark.max_vram_leak(repeat=5, warmup=1)
def test_its_cache_does_not_grow():
    CACHE["small"] = torch.ones(2**10, device="cuda")
""",
    ),
    "inject_oom": Note(
        {"rule": "[a rule](../rules.md): which allocations fail, and how"},
        """
import pytest
import torch


@pytest.mark.inject_oom("any:nth=1")
def test_it_falls_back():
    try:
        where = torch.ones(3, device="cuda").device.type
    except torch.OutOfMemoryError:
        where = "cpu"
    assert where == "cpu"
""",
    ),
    "oom_sweep": Note(
        _SWEEP
        | {
            "on_demand": "Whether the test is swept only if `--gpu-oom-sweep` is given; "
            "without this option it is an ordinary test."
        },
        """
import pytest
import torch


def double(values, device):
    return (torch.tensor(values, device=device) * 2).tolist()


@pytest.mark.oom_sweep(recover=True)
def test_every_allocation_may_fail():
    try:
        result = double([1, 2], "cuda")
    except torch.OutOfMemoryError:
        result = double([1, 2], "cpu")
    assert result == [2, 4]
""",
    ),
    "oom_fallback": Note(
        _SWEEP,
        """
import pytest
import torch


@pytest.mark.oom_sweep("sites", recover=True, on_demand=True)
def test_it_is_swept_on_demand():
    try:
        result = torch.ones(3, device="cuda").tolist()
    except torch.OutOfMemoryError:
        result = torch.ones(3).tolist()
    assert result == [1, 1, 1]
""",
    ),
    "hub_model": Note(
        {
            "name": "the name on the hub, with or without organisation",
            "source": "what it is built from: a known name such as `bert-large`, a "
            "`config.json` or a folder with one, or a checkpoint's folder, which is served "
            "without a change; `hub` means the hub's own model; `None` means the known model "
            "of that name, or the copy in the user's own cache. A relative path starts in "
            "the folder of the test's file",
            "format": "`safetensors`, or `bin` for the legacy `pytorch_model.bin`; if it is "
            "not given, the legacy file is also built when code asks for it",
            "max_shard_size": "the largest size of a file of weights, such as `200MB`; "
            "`None` means one file",
            "dtype": "dtype of the weights: `float32`, `float16`, `bfloat16`, `float64`",
            "seed": "seed of the random weights",
            "weights": "`random`, or `zeros`, which take almost no disk space",
            "architecture": "class of transformers; `None` means that of the config",
        },
        """
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

NAME = "my-org/my-classifier"


@pytest.mark.hub_model(NAME, source="bert-tiny")
def test_it_loads_by_name():
    tokenizer = AutoTokenizer.from_pretrained(NAME)
    model = AutoModelForSequenceClassification.from_pretrained(NAME, device_map="cuda")
    words = tokenizer("Once upon a time", return_tensors="pt").to("cuda")
    assert torch.isfinite(model(**words).logits).all()
""",
    ),
}
