"""Bytes that CUDA's attention kernels take beside their results, by shape.

Sources, torch 2.13, ``aten/src/ATen/native/transformers/cuda``:
``flash_attn/flash_api.cpp`` (``num_splits_heuristic``, ``set_params_splitkv``,
``mha_bwd``); ``mem_eff_attention/kernels/generate_kernels.py`` (the list of kernels, in
the order in which they are tried); ``mem_eff_attention/kernel_backward.h`` (``Params``);
``attention_backward.cu`` (``_efficient_attention_backward``).
"""

from __future__ import annotations

from math import ceil
from typing import Final, NamedTuple

_FLOAT_BYTES: Final = 4
#: Widest head of values that a memory-efficient kernel keeps in registers.
#: Source: ``FwdKernel.get_all``: the widest kernel that has a fixed width.
WIDEST_IN_REGISTERS: Final = 128
#: The number of logarithms (one per row) is rounded up to a multiple of this.
#: Source: ``kAlignLSE`` of ``kernel_forward.h``.
_ALIGN_LOGARITHMS: Final = 32
#: Bytes of the lock, the counter and the padding of a tile of dQ.
#: Source: ``GradQTempStorage``.
_TILE_HEAD_BYTES: Final = 16
#: The workspace of each head starts at a multiple of this many numbers (128 bits).
_ALIGN_WORKSPACE: Final = 4


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _blocks(number: int, size: int) -> int:
    return -(-number // size)


# -- flash -----------------------------------------------------------------------------


def flash_splits(blocks: int, processors: int, key_blocks: int) -> int:
    """Return the number of parts into which the keys are split: ``num_splits_heuristic``.

    Args:
        blocks: Blocks of rows, times heads, times the batch size.
        processors: Blocks that run at once: twice the card's multiprocessors.
        key_blocks: Blocks of keys.
    """
    if blocks >= 0.8 * processors:  # the constant in torch's source
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
        ),  # the constant in torch's source
        1,
    )


def flash_parts(
    batch: int,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    width: int,
    processors: int,
) -> list[int]:
    """Return the sizes in bytes of the buffers that join the parts of a forward.

    This holds for a forward without dropout.

    Args:
        batch: Size of the batch.
        heads: Numbers of query heads and of key heads.
        lengths: Numbers of query rows and of key rows.
        width: Width of a head, a multiple of 8.
        processors: Number of the card's multiprocessors.
    """
    count, key_count = heads
    rows, columns = lengths
    if rows == 1 and count > key_count:
        # Query heads that share a key head are treated as additional rows.
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
    return 32 if width <= 128 else 64  # noqa: PLR2004  # the constant in torch's source


def flash_backward(
    batch: int,
    heads: int,
    rows: int,
    width: int,
    processors: int,
    *,
    deterministic: bool,
) -> list[int]:
    """Return the sizes in bytes of a backward's dot products and its sums of dQ."""
    numbers = batch * heads * _rounded(rows, 128)
    parts = _blocks(processors, batch * heads) if deterministic else 1
    return [
        numbers * _FLOAT_BYTES,
        parts * numbers * _rounded(width, _width_step(width)) * _FLOAT_BYTES,
    ]


# -- memory-efficient ------------------------------------------------------------------


def efficient_logarithms(rows: int) -> int:
    """Return the number of rows for which a forward stores a logarithm."""
    return _rounded(rows, _ALIGN_LOGARITHMS)


class Kernel(NamedTuple):
    """A kernel of the memory-efficient backward.

    Attributes:
        rows: Query rows in a block: ``kBlockSizeI``.
        columns: Key rows in a block: ``kBlockSizeJ``.
        keeps_outputs: Whether the kernel keeps dK and dV in registers: ``kOutputInRF``.
        splits_keys: Whether several blocks may divide the keys: ``kEnableSplitKeys``.
        is_half: Whether the kernel works in half precision.
        computes_delta: Whether the kernel computes the rows' dot products itself.
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
    """Return the kernel that runs: the first one that supports the width and fits.

    Args:
        capability: The card's compute capability.
        width: The larger of the widths of a query head and a value head.
        is_half: Whether the operands are of half precision.
        drops: Whether the call uses dropout.
    """
    # Cards with 100 KiB of shared memory per multiprocessor cannot run the largest kernels.
    has_little = capability in {(8, 6), (8, 9)} or capability[0] == 12  # noqa: PLR2004  # consumer Blackwell
    is_new = capability >= (8, 0)
    widest = next((each for each in (32, 64, 128) if width <= each), 1 << 16)
    rows = 64
    if widest > 64 and (is_new or (capability >= (7, 0) and is_half)):  # noqa: PLR2004  # BwdKernel.get_all
        rows = 128
    if has_little and (not is_half or widest == 128) and rows == 128:  # noqa: PLR2004  # these kernels do not fit
        rows = 64
        if is_half and width <= 96 and not drops and capability[0] == 8:  # noqa: PLR2004  # a kernel for capability 8 alone
            rows, widest = 128, 96
    keeps_outputs = is_half and widest <= rows
    preloads = keeps_outputs and is_new
    columns = 128 if preloads and widest > 96 else 64  # noqa: PLR2004  # BwdKernel.get_all
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
    """Return the bytes in which a backward sums dQ, dK and dV: ``workspace_size``.

    Args:
        kernel: The kernel that runs.
        heads: Number of heads times the batch size.
        lengths: Numbers of query rows and of key rows.
        widths: Widths of a query head and of a value head.
        is_deterministic: Whether only deterministic algorithms may run.
    """
    rows, columns = lengths
    width, value_width = widths
    sums_outputs = kernel.is_half and not kernel.keeps_outputs
    splits = _blocks(columns, kernel.columns)
    if heads >= 256 and columns <= 2 * kernel.columns:  # noqa: PLR2004  # the constant in torch's source
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
