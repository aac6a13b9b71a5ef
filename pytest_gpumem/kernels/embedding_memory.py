"""How CUDA sums the gradients of an embedding's rows.

Source: ``aten/src/ATen/native/cuda/Embedding.cu`` and ``EmbeddingBackwardKernel.cu``
(``embedding_backward_cuda_kernel``), torch 2.13. The rule that chooses between the two
algorithms was found in recordings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pytest_gpumem.kernels.reduction_memory import Processors

#: Up to this many indices, one kernel sums all gradients without sorting the indices.
UNSORTED: Final = 3072
#: Rows that one thread sums. Source: ``NROWS_PER_THREAD``.
_ROWS_OF_A_THREAD: Final = 10
_WARP: Final = 32
_BLOCK: Final = 1024
#: One kernel block per row leaves the card idle if there are fewer than this many blocks
#: per multiprocessor and more than this many partial sums per block. The partial sums are
#: then added directly to the rows.
_IDLE: Final = 4


def parts(count: int, rows: int) -> tuple[int, int]:
    """Return the largest numbers of rows with a gradient and of their partial sums."""
    found = min(count, rows)
    return found, count // _ROWS_OF_A_THREAD + found


def add_to_rows(count: int, rows: int, width: int, processors: Processors) -> bool:
    """Return whether partial sums are added directly to the rows.

    Otherwise they are stored in a buffer, and added to the rows afterwards.

    Args:
        count: Number of indices.
        rows: Number of rows of the weight.
        width: Elements in a row.
        processors: The card's multiprocessors.
    """
    found, of_parts = parts(count, rows)
    threads = -(-width // _WARP) * _WARP
    blocks = -(-found * threads // min(threads, _BLOCK))
    return blocks < _IDLE * processors.count and _IDLE * blocks < of_parts
