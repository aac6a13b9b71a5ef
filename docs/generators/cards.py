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
            "What `--gpu-card` and `find_card` know by name. Write the name of the first "
            "column or the driver's; case, blanks, hyphens and the maker's words do not "
            "matter. Any other card can be made up: `--gpu-card=16GiB,cc=8.6,sms=46`.",
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
            "**Total** is what the driver reports to CUDA, in bytes where an output "
            "shows them; `≈` marks one known in whole MiB or to 0.01 GiB. **Others saw**: "
            "the smallest and the largest total in public issues, logs and data sets "
            "(`tests/published/cards.json` names each source). The same card "
            "differs by up to 5 % with driver, system (Windows shows more) and error "
            "correction; where it matters to the byte, make the card up.",
            "**Context** is what a process's CUDA context takes of the card, from its "
            "first use until the process ends: free memory, NVML and OOM texts count it. "
            "It is modelled, not measured: 36 MiB and 2.18 MiB for each 1,024 threads "
            "that can run at once, fitted to what OOM texts of 21 kinds of cards count "
            "beside PyTorch's own bytes (median error 5 %, worst 21 %). Kernels of other "
            "libraries, NCCL and old drivers without lazy loading take more. "
            "`--gpu-card=T4,ctx=135MiB` gives another figure, `T4,ctx=0` none. A made-up "
            "card's context takes nothing unless `ctx=` says so. `nccl=200MiB` is what each "
            "communicator of [NCCL](nccl.md) takes; unless it is said, nothing.",
            "Slices of a card (MIG) are cards of their own here: "
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
