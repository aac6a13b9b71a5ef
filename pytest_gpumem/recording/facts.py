"""Facts of a card and its libraries that do not depend on a model."""

from __future__ import annotations

import gc
from importlib import metadata
from typing import Any, Final

import torch

from pytest_gpumem.devices.environment import driver_version

_LIBRARIES: Final = ("torch", "transformers", "accelerate", "pytest-gpumem")
_MIB: Final = 2**20


def describe_card() -> dict[str, Any]:
    """Return the current card's name, size and what its kernels depend on."""
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "total_bytes": torch.cuda.mem_get_info()[1],
        "compute_capability": [properties.major, properties.minor],
        "multi_processor_count": properties.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide what is allocated."""
    installed = {
        each.name: each.version
        for each in metadata.distributions()
        if each.name in _LIBRARIES
    }
    return {**installed, "torch": torch.__version__}


def free_everything() -> None:
    """Collect garbage, free caches and workspaces, and reset peaks."""
    gc.collect()
    torch.cuda.synchronize()
    clear: Any = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # noqa: SLF001  # torch's name for it
    if clear is not None:
        clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure_context() -> int:
    """Return the bytes of the card that are neither the allocator's nor free.

    On a card without other processes this is the context; otherwise it includes theirs.
    """
    torch.zeros(1, device="cuda")
    free_everything()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def measure_workspace() -> dict[str, int]:
    """Return the bytes that a library's first call keeps allocated, by call."""
    kept = {}
    for name, dtype in (("matmul fp32", torch.float32), ("matmul fp16", torch.float16)):
        free_everything()
        operand = torch.ones(256, 256, dtype=dtype, device="cuda")
        before = torch.cuda.memory_allocated()
        product = operand @ operand
        kept[name] = torch.cuda.memory_allocated() - before - product.nbytes
        del operand, product
    free_everything()
    return kept


def oom_texts() -> dict[str, str]:
    """Return the allocator's error texts for requests that cannot be served."""
    free_everything()
    _free, total = torch.cuda.mem_get_info()
    held = torch.ones(3 * _MIB, dtype=torch.uint8, device="cuda")
    texts = {"more than the card": _fail(total + _MIB)}
    try:
        torch.cuda.set_per_process_memory_fraction(64 * _MIB / total)
        texts["more than the fraction of 64 MiB"] = _fail(80 * _MIB)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    del held
    free_everything()
    return texts


def _fail(nbytes: int) -> str:
    try:
        torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        return str(error)
    return ""
