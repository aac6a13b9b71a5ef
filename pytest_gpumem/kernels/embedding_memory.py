"""How CUDA adds up the gradients of an embedding's rows.

Source: ``aten/src/ATen/native/cuda/Embedding.cu`` and ``EmbeddingBackwardKernel.cu``
(``embedding_backward_cuda_kernel``), torch 2.13. What decides between its two ways was
found in recordings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pytest_gpumem.kernels.reduction_memory import Processors

#: Indices up to which one kernel adds all up, without sorting them.
UNSORTED: Final = 3072
#: Rows that one thread adds up. Source: ``NROWS_PER_THREAD``.
_ROWS_OF_A_THREAD: Final = 10
_WARP: Final = 32
_BLOCK: Final = 1024
#: Blocks for each multiprocessor, and parts for each block, between which a kernel for
#: each row leaves the card idle: parts then add to the rows themselves.
_IDLE: Final = 4


def parts(count: int, rows: int) -> tuple[int, int]:
    """Return how many rows at most have a gradient, and of how many parts it is made."""
    found = min(count, rows)
    return found, count // _ROWS_OF_A_THREAD + found


def add_to_rows(count: int, rows: int, width: int, processors: Processors) -> bool:
    """Tell whether parts are added to the rows, and not laid down to be added later.

    Args:
        count: Indices.
        rows: Of the weight.
        width: Of a row.
        processors: The card's.
    """
    found, of_parts = parts(count, rows)
    threads = -(-width // _WARP) * _WARP
    blocks = -(-found * threads // min(threads, _BLOCK))
    return blocks < _IDLE * processors.count and _IDLE * blocks < of_parts
