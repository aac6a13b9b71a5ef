"""What torch's build says of itself: one for CUDA, while cards are simulated."""

from __future__ import annotations

from typing import Any, Final

import torch

#: What a build for these cards says of itself, where the installed one is for the CPU.
#: Source: the wheels that ``pip install torch`` takes on Linux, torch 2.13.
CUDA_VERSION: Final = "13.0"
CUDNN_VERSION: Final = 91300


def build_names() -> list[tuple[Any, str, Any]]:
    """Return owner, name and value of what tells of torch's build: it is for CUDA.

    A build for CUDA says it itself. Libraries read the version's numbers, and take a
    build without one for one of the CPU.
    """
    if torch.version.cuda is not None:
        return []
    return [
        (torch.version, "cuda", CUDA_VERSION),
        (torch.backends.cuda, "is_built", lambda: True),
        (torch.backends.cudnn, "version", lambda: CUDNN_VERSION),
        (torch.backends.cudnn, "is_available", lambda: True),
        # What torch's own Python imports from such a build; graphs are refused.
        (
            torch._C,
            "_cuda_CUDAAllocator_AllocatorState",
            type("AllocatorState", (), {}),
        ),
        (torch._C, "_set_cached_tensors_enabled", lambda _enabled: None),
    ]
