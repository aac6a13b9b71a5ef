"""The table of cards and the modelled context, held to what people published."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any, Final

import pytest

from pytest_gpumem.cards import CARDS, SLICES, find_card
from pytest_gpumem.errors import CardError

PUBLISHED: Final = Path(__file__).parents[1] / "published"
_BYTES: Final = {"B": 1, "MiB": 2**20, "GiB": 2**30}
#: What a note says where a process holds more beside PyTorch than its context.
_MORE: Final = (
    "NCCL",
    "vLLM",
    "Isaac",
    "cuFFT",
    "libraries",
    "LoRA",
    "0 bytes",
    "TP",
)


def _read(name: str) -> Any:
    return json.loads((PUBLISHED / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", [*CARDS, *SLICES])
def test_a_total_is_what_others_saw(key: str) -> None:
    """The nearest published total is within 0.5 %, and all within 5 %."""
    cards = CARDS | SLICES
    seen = _read("cards.json").get(key, ())
    off = [
        abs(cards[key].total_bytes / (float(each["total"]) * _BYTES[each["unit"]]) - 1)
        for each in seen
    ]
    assert not off or (min(off) < 0.005 and max(off) < 0.05), off
    assert off or key == "K80" or key in SLICES


def _contexts() -> dict[str, list[float]]:
    """Return published MiB beside PyTorch's own bytes, by card of the table."""
    by_card = defaultdict(list)
    for each in _read("oom_texts.json"):
        beside = each.get("non_pytorch_mib")
        if beside is None or any(word in (each["note"] or "") for word in _MORE):
            continue
        try:
            (card,) = find_card(each["card"])
        except CardError:
            continue
        if card.source != "made up":
            by_card[card.name].append(beside)
    return by_card


def test_the_modelled_context_is_about_what_oom_texts_count() -> None:
    """Over the cards that were named, half are within 8 %, and three in four in 20 %."""
    errors = {}
    for name, published in _contexts().items():
        (card,) = find_card(name)
        errors[name] = abs(card.context_bytes / 2**20 / median(published) - 1)

    ordered = sorted(errors.values())
    assert len(ordered) >= 18, errors
    assert median(ordered) < 0.08, errors
    assert ordered[len(ordered) * 3 // 4] < 0.20, errors
