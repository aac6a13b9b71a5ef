"""The bytes of the workspace that cuBLAS takes from the caching allocator."""

from __future__ import annotations

import re
from typing import Final

#: Bytes of one workspace on most cards: 2 x 4096 KiB + 8 x 16 KiB.
SMALL: Final = 8_519_680
#: Bytes of one workspace on compute capability 9, 10 and 12: 32 MiB.
LARGE: Final = 33_554_432
#: Bytes of a workspace that cuBLASLt takes for itself: 1024 KiB.
#: Source: ``parseCUDABlasLtWorkspaceSize``.
OF_LT: Final = 1_048_576


def workspace_bytes(compute_capability: tuple[int, int], setting: str | None) -> int:
    """Return the bytes of a cuBLAS workspace.

    The first product on each pair of cuBLAS handle and stream takes a workspace and keeps
    it; from torch 2.15 on each product takes one and frees it at its end
    (``getCurrentCUDABlasHandleWithWorkspace``), unless ``TORCH_CUBLAS_WORKSPACE_CACHE`` is
    ``1``. A card's ``keeps_workspaces`` says which.

    Args:
        compute_capability: The card's compute capability.
        setting: The value of ``CUBLAS_WORKSPACE_CONFIG``, or None.

    Source: ``aten/src/ATen/cuda/CublasHandlePool.cpp``, torch 2.13
    (``parseChosenWorkspaceSize``); the sizes by capability are those of that release.
    """
    if setting:
        pairs = re.findall(r":([0-9]+):([0-9]+)", setting)
        if pairs:
            return sum(int(size) * 1024 * int(count) for size, count in pairs)
    return LARGE if compute_capability[0] in (9, 10, 12) else SMALL
