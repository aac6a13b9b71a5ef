"""The page of the docs about models of other libraries."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from architectures import Row

#: Why a model does not run on the CPU, by the words of its error.
REASONS: Final = {
    r"parameters are too many": "stay too large",
    r"requires the \w+ library|ImportError|No module named": "need another library",
    r"too slow": "take too long",
    r"crashed": "end their process",
    r"": "are not built, or not fed, by names and values alone",
}

#: Why models differ, by their names and what differs.
KNOWN: Final = {
    r"^VitsModel": "it draws some of its random numbers on the host and some on the card, and a card "
    "has a generator of its own",
    r"^detection.keypoint_rcnn: differs: model.roi_heads": "on a card torchvision suppresses boxes by "
    "another algorithm (`batched_nms`, by the number of boxes), which has the proposals in "
    "another order, and so a sum over them",
}

#: Why models leave bytes, by their names.
LEFT: Final = {
    "RwkvForCausalLM": "as `RwkvModel`",
    "RwkvModel": "its graph is a reference cycle and cannot run backward, on the CPU "
    "either; there, too, the parameters stay after the model is deleted",
}

HEAD: Final = """# Models of other libraries

The models are: every class that transformers' automatic classes can return, made small by general
rules; the smallest model of each module of timm and torchvision; the blocks of diffusers. Each
model runs on the CPU and on a simulated card, in a process of its own: a forward, a backward, and a
generation if it can generate. Values and gradients are compared bit by bit, and the card must be
empty after everything is deleted.

```console
$ tox run -e architectures -- --write --out rows.jsonl
$ tox run -e architectures-vision -- --write --out rows.jsonl
```

These commands make this page. torchvision and timm run in another environment, with its own torch.
A model that cannot be made small, gets no valid input or does not run on the CPU is only counted.
"""


def _why(row: Row) -> str:
    words = f"{row.cpu} {row.details}"
    return next(text for rule, text in REASONS.items() if re.search(rule, words))


def _is_equal(row: Row) -> bool:
    return row.forward == "equal" and row.backward in {"equal", ""}


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| library | tried | run on the CPU | forward equal | gradients, equal | "
        "generate, equal | bytes left |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in dict.fromkeys(each.family for each in rows):
        mine = [each for each in rows if each.family == family]
        ran = [each for each in mine if each.cpu == "ran"]
        cells = [
            family,
            str(len(mine)),
            str(len(ran)),
            str(sum(each.forward == "equal" for each in ran)),
            *(
                f"{sum(bool(getattr(each, stage)) for each in ran)}, "
                f"{sum(getattr(each, stage) == 'equal' for each in ran)}"
                for stage in ("backward", "generate")
            ),
            str(sum(each.bytes_left for each in ran)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _exceptions(rows: Sequence[Row]) -> list[str]:
    """Return a line for each model that is not as on the CPU."""
    lines = []
    for each in rows:
        if each.cpu != "ran":
            continue
        for stage in ("forward", "backward", "generate"):
            found = getattr(each, stage)
            if found not in {"equal", ""}:
                words = f"{each.name}: {found}"
                known = (text for rule, text in KNOWN.items() if re.search(rule, words))
                reason = next(known, "not explained")
                lines.append(
                    f"- {each.family} `{each.name}`, {stage}: {found}: {reason}"
                )
        if each.bytes_left:
            reason = LEFT.get(each.name, "not explained")
            lines.append(
                f"- {each.family} `{each.name}` leaves {each.bytes_left:,} bytes: "
                f"{reason}"
            )
    by_rows = [f"`{each.name}`" for each in rows if each.by_rows]
    if by_rows:
        lines.append(
            f"- {', '.join(by_rows)}: equal once the CPU's group norms are given values "
            "stored by rows. A card stores so what comes in channels last "
            "(`group_norm.cpp`); the CPU's kernels for the two layouts, also those of the "
            "convolutions after it, differ in the last bits"
        )
    cached = [f"`{each.name}`" for each in rows if each.bytes_cached]
    if cached:
        lines.append(
            f"- {', '.join(cached)}: caches of the library's functions "
            "(`functools.lru_cache`) keep tensors of the card; emptied, nothing stays"
        )
    return lines or ["None."]


def text_of(rows: Sequence[Row]) -> str:
    """Return the page.

    Args:
        rows: Of all families.
    """
    ran = [each for each in rows if each.cpu == "ran"]
    equal = sum(map(_is_equal, ran))
    versions = dict.fromkeys(each.versions for each in rows)
    left_out = Counter((each.family, _why(each)) for each in rows if each.cpu != "ran")
    return "\n".join(
        [
            HEAD,
            f"With {'; '.join(versions)}. **{equal} of the {len(ran)} that run on the CPU "
            f"are equal to it ({100 * equal / max(len(ran), 1):.1f} %)**, forward and "
            "gradients.",
            "",
            *_table(rows),
            "",
            "## What is not as on the CPU",
            "",
            *_exceptions(rows),
            "",
            "## What does not run on the CPU",
            "",
            *(
                f"- {number} of {family} {text}"
                for (family, text), number in left_out.most_common()
            ),
            "",
        ]
    )
