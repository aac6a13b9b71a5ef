"""``scaled_dot_product_attention`` by every kernel that a card may choose."""

from __future__ import annotations

import itertools
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from recorded_requests import Case
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from allocator_requests import Notes

VALUES: Final = "none"
CARDS: Final = (("7.5", 40), ("8.0", 108), ("8.9", 128), ("9.0", 132))
_DTYPES: Final = ("float32", "float16", "bfloat16")
#: Batch, query heads, key heads, query rows, key rows.
_SHAPES: Final = (
    (2, 4, 4, 64, 64),
    (2, 4, 4, 33, 77),
    (2, 8, 2, 64, 64),
    # Few heads and many keys: flash cuts the keys into parts.
    (1, 2, 2, 512, 512),
    # One row, as in generation.
    (1, 8, 8, 1, 1500),
    (2, 8, 2, 1, 700),
)
_WIDTHS: Final = (32, 64, 80, 100, 128, 192, 256, 264)
#: Masks: none, of booleans, of numbers; each broadcast over heads, or not.
_MASKS: Final = ("none", "causal", "bool", "bias", "bias for each head", "learned bias")
_DROPOUTS: Final = (0.0, 0.1)


def groups() -> list[str]:
    """Return every type with every mask."""
    return [f"{mask} {dtype}" for dtype, mask in itertools.product(_DTYPES, _MASKS)]


def cases(group: str) -> Iterator[Case]:
    """Yield shapes, widths of heads, dropout, with and without gradients."""
    mask, _blank, dtype = group.rpartition(" ")
    for shape, width, dropout, grows in itertools.product(
        _SHAPES, _WIDTHS, _DROPOUTS, (True, False)
    ):
        if dropout and width not in {64, 80}:
            continue
        if shape not in _SHAPES[:3] and width not in {64, 128}:
            continue
        if not grows and width not in {64, 100, 256}:
            continue
        for layout in ("", ", heads first"):
            if layout and (shape != _SHAPES[1] or width not in {64, 100}):
                continue
            words = f"{'x'.join(map(str, shape))} of {width}{layout}"
            words += f", dropout {dropout}" if dropout else ""
            words += "" if grows else ", no gradients"
            yield Case(
                words,
                zlib.crc32(words.encode()),
                partial(
                    _run,
                    mask,
                    getattr(torch, dtype),
                    (*shape, width),
                    dropout,
                    grows,
                    bool(layout),
                ),
            )


def _mask(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    batch, heads, _key_heads, rows, columns, _width = shape
    if kind in {"none", "causal"}:
        return None
    if kind == "bool":
        return torch.ones(batch, 1, rows, columns, dtype=torch.bool, device="cuda")
    count = heads if kind == "bias for each head" else 1
    mask = torch.zeros(batch, count, rows, columns, dtype=dtype, device="cuda")
    return mask.requires_grad_(kind == "learned bias")


def _operand(  # noqa: PLR0917  # a shape
    batch: int,
    heads: int,
    rows: int,
    width: int,
    dtype: torch.dtype,
    has_heads_first: bool,  # noqa: FBT001  # as the caller has it
) -> torch.Tensor:
    """Return zeros; rows are first in memory, as most models have them, or heads."""
    if has_heads_first:
        return torch.zeros(batch, heads, rows, width, dtype=dtype, device="cuda")
    made = torch.zeros(batch, rows, heads, width, dtype=dtype, device="cuda")
    return made.transpose(1, 2)


def _run(  # noqa: PLR0917  # one case
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    dropout: float,
    grows: bool,  # noqa: FBT001  # as the product has it
    has_heads_first: bool,  # noqa: FBT001  # as the product has it
    notes: Notes,
) -> None:
    batch, heads, key_heads, rows, columns, width = shape
    sizes = ((heads, rows), (key_heads, columns), (key_heads, columns))
    query, key, value = (
        _operand(batch, count, each, width, dtype, has_heads_first).requires_grad_(
            grows
        )
        for count, each in sizes
    )
    mask = _mask(kind, dtype, shape)
    with notes.phase("forward"):
        result = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=kind == "causal",
            enable_gqa=heads != key_heads,
        )
    if not grows:
        return
    gradient = torch.ones_like(result)
    leaves = [query, key, value, *([mask] if kind == "learned bias" else [])]
    with notes.phase("backward"):
        found = torch.autograd.grad(result, leaves, gradient)
    del found
