"""Bytes and PyTorch's memory fractions."""

from __future__ import annotations

import math


def fraction_for(limit_bytes: int, total_bytes: int) -> float:
    """Return the memory fraction whose limit is exactly ``limit_bytes``.

    PyTorch truncates when it converts a fraction to bytes, so the plain quotient can give
    one byte too few.

    Args:
        limit_bytes: The wanted limit in bytes, at most ``total_bytes``.
        total_bytes: The card's bytes.

    Source: ``CUDACachingAllocator.cpp``, ``setMemoryFraction``:
    ``static_cast<size_t>(fraction * total)``.
    """
    fraction = limit_bytes / total_bytes
    while int(fraction * total_bytes) < limit_bytes:
        fraction = math.nextafter(fraction, math.inf)
    return fraction
