"""Bytes that CUDA's attention kernels take for themselves, by their shapes.

Sources, torch 2.13, ``aten/src/ATen/native/transformers/cuda``:
``flash_attn/flash_api.cpp`` (``num_splits_heuristic``, ``set_params_splitkv``,
``mha_bwd``); ``mem_eff_attention/kernels/generate_kernels.py`` (which kernels there are,
in which order they are tried); ``mem_eff_attention/kernel_backward.h`` (``Params``);
``attention_backward.cu`` (``_efficient_attention_backward``).
"""

from __future__ import annotations

from math import ceil
from typing import Final, NamedTuple

_FLOAT_BYTES: Final = 4
#: Widest head of values that a memory-efficient kernel keeps in registers.
#: Source: ``FwdKernel.get_all``: the widest kernel but the one for any width.
WIDEST_IN_REGISTERS: Final = 128
#: Rows are rounded up to this. Source: ``kAlignLSE`` of ``kernel_forward.h``.
_ALIGN_LOGARITHMS: Final = 32
#: Lock, counter and padding of a tile of dQ. Source: ``GradQTempStorage``.
_TILE_HEAD_BYTES: Final = 16
#: Workspaces of the next head start at a multiple of so many numbers (128 bits).
_ALIGN_WORKSPACE: Final = 4


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _blocks(number: int, size: int) -> int:
    return -(-number // size)


# -- flash -----------------------------------------------------------------------------


def flash_splits(blocks: int, processors: int, key_blocks: int) -> int:
    """Return the number of parts into which the keys are split: ``num_splits_heuristic``.

    Args:
        blocks: Blocks of rows, times heads, times the batch.
        processors: Places to run them in: twice the card's multiprocessors.
        key_blocks: Blocks of keys.
    """
    if blocks >= 0.8 * processors:  # as the source has it
        return 1
    most = min(128, processors, key_blocks)

    def is_of_use(splits: int) -> bool:
        before = _blocks(key_blocks, splits - 1) if splits > 1 else 0
        return _blocks(key_blocks, splits) != before

    efficiencies = {}
    for splits in range(1, most + 1):
        if is_of_use(splits):
            waves = blocks * splits / processors
            efficiencies[splits] = waves / ceil(waves)
    best = max(efficiencies.values(), default=0.0)
    return next(
        (
            each for each, found in efficiencies.items() if found >= 0.85 * best
        ),  # likewise
        1,
    )


def flash_parts(
    batch: int,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    width: int,
    processors: int,
) -> list[int]:
    """Return the sizes of what a forward without dropout joins its parts in, in bytes.

    Args:
        batch: Size of the batch.
        heads: Of queries and of keys.
        lengths: Rows of queries and of keys.
        width: Of a head, a multiple of 8.
        processors: The card's multiprocessors.
    """
    count, key_count = heads
    rows, columns = lengths
    if rows == 1 and count > key_count:
        # Heads that share a key head are taken for rows.
        count, rows = key_count, count // key_count
    block = 256 if width <= 64 else 128 if width <= 128 else 64  # noqa: PLR2004  # set_params_splitkv
    splits = flash_splits(
        batch * count * _blocks(rows, 64), 2 * processors, _blocks(columns, block)
    )
    if splits == 1:
        return []
    numbers = splits * batch * count * rows
    return [
        numbers * _FLOAT_BYTES,
        numbers * _rounded(width, _width_step(width)) * _FLOAT_BYTES,
    ]


def _width_step(width: int) -> int:
    return 32 if width <= 128 else 64  # noqa: PLR2004  # as the source has it


def flash_backward(
    batch: int,
    heads: int,
    rows: int,
    width: int,
    processors: int,
    *,
    deterministic: bool,
) -> list[int]:
    """Return the sizes of a backward's dot products and of its sums of dQ, in bytes."""
    numbers = batch * heads * _rounded(rows, 128)
    parts = _blocks(processors, batch * heads) if deterministic else 1
    return [
        numbers * _FLOAT_BYTES,
        parts * numbers * _rounded(width, _width_step(width)) * _FLOAT_BYTES,
    ]


# -- memory-efficient ------------------------------------------------------------------


def efficient_logarithms(rows: int) -> int:
    """Return for how many rows a forward stores a logarithm."""
    return _rounded(rows, _ALIGN_LOGARITHMS)


class Kernel(NamedTuple):
    """A kernel of the memory-efficient backward.

    Attributes:
        rows: Queries of a block: ``kBlockSizeI``.
        columns: Keys of a block: ``kBlockSizeJ``.
        keeps_outputs: Whether dK and dV stay in registers: ``kOutputInRF``.
        splits_keys: Whether several blocks may share the keys: ``kEnableSplitKeys``.
        is_half: Whether its numbers are of half precision.
        computes_delta: Whether it computes the rows' dot products itself.
    """

    rows: int
    columns: int
    keeps_outputs: bool
    splits_keys: bool
    is_half: bool
    computes_delta: bool


def efficient_kernel(
    capability: tuple[int, int], width: int, *, is_half: bool, drops: bool
) -> Kernel:
    """Return the kernel that runs: the first one that takes the width and fits.

    Args:
        capability: The card's compute capability.
        width: The widest head, of queries or values.
        is_half: Whether the numbers are of half precision.
        drops: Whether there is dropout.
    """
    # Cards of 100 KiB of shared memory for a multiprocessor have no room for the largest.
    has_little = capability in {(8, 6), (8, 9)} or capability[0] == 12  # noqa: PLR2004  # the consumer's Blackwell
    is_new = capability >= (8, 0)
    widest = next((each for each in (32, 64, 128) if width <= each), 1 << 16)
    rows = 64
    if widest > 64 and (is_new or (capability >= (7, 0) and is_half)):  # noqa: PLR2004  # BwdKernel.get_all
        rows = 128
    if has_little and (not is_half or widest == 128) and rows == 128:  # noqa: PLR2004  # they do not fit
        rows = 64
        if is_half and width <= 96 and not drops and capability[0] == 8:  # noqa: PLR2004  # one of their own
            rows, widest = 128, 96
    keeps_outputs = is_half and widest <= rows
    preloads = keeps_outputs and is_new
    columns = 128 if preloads and widest > 96 else 64  # noqa: PLR2004  # as there
    is_volta = (7, 0) <= capability < (7, 5)
    return Kernel(
        rows=rows,
        columns=columns,
        keeps_outputs=keeps_outputs,
        splits_keys=capability >= (7, 0),
        is_half=is_half,
        computes_delta=is_half and (keeps_outputs or not is_volta),
    )


def efficient_workspace(
    kernel: Kernel,
    heads: int,
    lengths: tuple[int, int],
    widths: tuple[int, int],
    *,
    is_deterministic: bool,
) -> int:
    """Return the bytes of a backward's sums of dQ, dK and dV: ``workspace_size``.

    Args:
        kernel: The kernel that runs.
        heads: Heads times the batch.
        lengths: Rows of queries and of keys.
        widths: Of a head of queries, and of values.
        is_deterministic: Whether only deterministic algorithms may run.
    """
    rows, columns = lengths
    width, value_width = widths
    sums_outputs = kernel.is_half and not kernel.keeps_outputs
    splits = _blocks(columns, kernel.columns)
    if heads >= 256 and columns <= 2 * kernel.columns:  # noqa: PLR2004  # as the source has it
        splits = 1
    if sums_outputs:
        splits = min(splits, 200 // heads)
    if not kernel.splits_keys or splits < 1 or is_deterministic:
        splits = 1
    numbers = 0
    if sums_outputs:
        for each in (width, value_width):
            numbers += splits * kernel.columns * _rounded(each, kernel.rows)
    if kernel.splits_keys or kernel.is_half:
        tile = kernel.rows * kernel.columns + _TILE_HEAD_BYTES // _FLOAT_BYTES
        numbers += _blocks(rows, kernel.rows) * _blocks(width, kernel.columns) * tile
    return heads * _rounded(numbers, _ALIGN_WORKSPACE) * _FLOAT_BYTES
