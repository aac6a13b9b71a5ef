"""How far CUDA's kernels advance the offset of a random number generator.

A kernel advances the offset by the most numbers that one of its threads may draw.

The offset counts 32-bit numbers per thread and is always a multiple of four.

Sources: ``calc_execution_policy`` and ``distribution_nullary_kernel`` of
``aten/src/ATen/native/cuda/DistributionTemplates.h``, ``SplitUntil32Bit`` of
``TensorIterator.cpp``, ``CUDAGeneratorState::increase`` of
``aten/src/ATen/cuda/CUDAGeneratorImpl.cpp``, torch 2.13.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pytest_gpumem.kernels.reduction_memory import Processors

_BLOCK: Final = 256
#: The most by which one call of curand advances the offset.
STEP: Final = 4
_LARGEST_INDEX: Final = 2**31 - 1
#: Rows of the largest grid. Source: ``maxGridSize[1]`` of every card.
_GRID_ROWS: Final = 65535


def rounded(count: int) -> int:
    """Round a count up to a multiple of four, as every step of an offset is."""
    return -(-count // STEP) * STEP


def by_grid(count: int, at_once: int, processors: Processors) -> int:
    """Return the step for ``count`` numbers if each call draws ``at_once`` of them."""
    if count == 0:
        return 0
    blocks = processors.count * (processors.max_threads // _BLOCK)
    threads = _BLOCK * min(blocks, -(-count // _BLOCK))
    return ((count - 1) // (threads * at_once) + 1) * STEP


def by_iterator(
    count: int, element_bytes: int, at_once: int, processors: Processors
) -> int:
    """Return the step for dense tensors, which are halved until 32 bits index them.

    The undivided tensor advances the offset as well as each of its halves.
    """
    move = by_grid(count, at_once, processors)
    if count * element_bytes <= _LARGEST_INDEX:
        return move
    half = count // 2
    parts = (half, count - half)
    return move + sum(
        by_iterator(each, element_bytes, at_once, processors) for each in parts
    )


def by_permutation(count: int, processors: Processors) -> int:
    """Return the step for a permutation: random keys, and new draws for duplicate keys.

    Source: ``randperm_out_cuda`` of ``cuda/Randperm.cu``,
    ``randperm_handle_duplicate_keys`` of ``cuda/Randperm.cuh``.
    """
    if count == 0:
        return 0
    bits = math.ceil(math.log2(count - (6 * count**2 + 1) / (math.log(0.9) * 12)))
    key_bytes = 4 if bits <= 32 else 8  # noqa: PLR2004  # bits of the key
    return by_iterator(count, key_bytes, 2, processors) + rounded(count)


def by_rows(rows: int) -> int:
    """Return the step for draws with replacement from ``rows`` distributions.

    Source: ``multinomial_with_replacement_kernel_impl`` of ``cuda/MultinomialKernel.cu``.
    """
    if rows == 0:
        return 0
    return ((rows - 1) // min(rows, _GRID_ROWS) + 1) * STEP
