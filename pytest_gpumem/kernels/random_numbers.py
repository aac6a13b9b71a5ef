"""How far CUDA's kernels move a generator's offset: what each thread may draw, by size.

An offset counts numbers of 32 bits for each thread, always a multiple of four.

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
#: What one call of curand moves the offset by, at most.
STEP: Final = 4
_LARGEST_INDEX: Final = 2**31 - 1
#: The rows of a grid. Source: ``maxGridSize[1]`` of every card.
_GRID_ROWS: Final = 65535


def rounded(count: int) -> int:
    """Return a count as an offset moves by it: the next multiple of four."""
    return -(-count // STEP) * STEP


def by_grid(count: int, at_once: int, processors: Processors) -> int:
    """Return the move for ``count`` numbers, of which each call makes ``at_once``."""
    if count == 0:
        return 0
    blocks = processors.count * (processors.max_threads // _BLOCK)
    threads = _BLOCK * min(blocks, -(-count // _BLOCK))
    return ((count - 1) // (threads * at_once) + 1) * STEP


def by_iterator(
    count: int, element_bytes: int, at_once: int, processors: Processors
) -> int:
    """Return the same for dense numbers, which are halved until 32 bits can count them.

    The whole moves the offset, too.
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
    """Return the move for a permutation: random keys, and a draw for each that is twice.

    Source: ``randperm_out_cuda`` of ``cuda/Randperm.cu``,
    ``randperm_handle_duplicate_keys`` of ``cuda/Randperm.cuh``.
    """
    if count == 0:
        return 0
    bits = math.ceil(math.log2(count - (6 * count**2 + 1) / (math.log(0.9) * 12)))
    key_bytes = 4 if bits <= 32 else 8  # noqa: PLR2004  # of a key
    return by_iterator(count, key_bytes, 2, processors) + rounded(count)


def by_rows(rows: int) -> int:
    """Return the move for draws with replacement, of so many distributions.

    Source: ``multinomial_with_replacement_kernel_impl`` of ``cuda/MultinomialKernel.cu``.
    """
    return ((rows - 1) // min(rows, _GRID_ROWS) + 1) * STEP
