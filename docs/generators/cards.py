"""The page of cards: the table, and what others saw of the same cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from generators.markdown import DASH, page, table
from pytest_gpumem.cards import CARDS, Card
from pytest_gpumem.sizes import format_size

PUBLISHED: Final = Path(__file__).parents[2] / "tests/published"
_BYTES: Final = {"B": 1, "MiB": 2**20, "GiB": 2**30}


def published_totals(key: str) -> list[int]:
    """Return what others saw as the total of a card, in bytes."""
    seen = json.loads((PUBLISHED / "cards.json").read_text(encoding="utf-8"))
    return [
        round(float(each["total"]) * _BYTES[each["unit"]]) for each in seen.get(key, ())
    ]


def cards() -> str:
    """Return the page."""
    rows = [_row(key, card) for key, card in CARDS.items()]
    return page(
        [
            "# Cards\n\n"
            "These are the cards that `--gpu-card` and `find_card` know by name. Use the name in "
            "the first column or the driver's name; case, blanks, hyphens and words like "
            "NVIDIA do not matter. Any other card can be made up: "
            "`--gpu-card=16GiB,cc=8.6,sms=46`.",
            table(
                [
                    "card",
                    "driver's name",
                    "total",
                    "others saw",
                    "compute capability",
                    "multiprocessors",
                    "context",
                ],
                rows,
            ),
            "**Total** is the total that the driver reports to CUDA: exact bytes if a published "
            "output shows them; `≈` marks a total that is known in whole MiB or to 0.01 GiB. "
            "**Others saw**: the smallest and the largest total in public issues, logs and "
            "data sets (`tests/published/cards.json` names each source). The total of one "
            "kind of card differs by up to 5 % with the driver, the system (Windows shows "
            "more) and error correction. If you need the exact bytes of your card, make it "
            "up.",
            "**Context** is the memory that a process's CUDA context takes, from the first "
            "use of the card until the process ends. Free memory, NVML and OOM texts count "
            "it. It is modelled, not measured: 36 MiB plus 2.18 MiB for each 1,024 threads "
            "that can run at once. The model is fitted to the bytes that OOM texts of 21 "
            "kinds of cards count outside PyTorch (median error 5 %, worst 21 %). Kernels "
            "of other libraries, NCCL and old drivers without lazy loading take more. "
            "`--gpu-card=T4,ctx=135MiB` sets another size, `T4,ctx=0` none. A made-up card "
            "has no context unless `ctx=` gives its size. `nccl=200MiB` is the memory that "
            "each communicator of [NCCL](nccl.md) takes; the default is 0.",
            "Slices of a card (MIG) count as cards here: "
            "`--gpu-card=A100-80GB:1g.10gb`.",
        ]
    )


def _row(key: str, card: Card) -> list[str]:
    exact = card.precision_bytes == 1
    total = f"{card.total_bytes:,}" if exact else f"≈ {format_size(card.total_bytes)}"
    seen = published_totals(key)
    ends = dict.fromkeys(map(_gib, (min(seen), max(seen)))) if seen else [DASH]
    major, minor = card.compute_capability
    return [
        f"`{key}`",
        card.name,
        total,
        " to ".join(ends),
        f"{major}.{minor}",
        str(card.multi_processor_count),
        format_size(card.context_bytes),
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
