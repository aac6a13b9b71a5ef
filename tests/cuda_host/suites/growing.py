"""Peaks that grow from one run to the next."""

from __future__ import annotations

import os

import torch

MIB = 2**20


def _bytes(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cuda")


def test_it_stays() -> None:
    kept = [_bytes(5 * MIB) for _ in range(3)]
    del kept


def test_it_grows() -> None:
    _bytes((8 if "GROWN" in os.environ else 7) * MIB)


def test_it_falls_back() -> None:
    try:
        _bytes(40 * MIB)
    except torch.OutOfMemoryError:
        torch.empty(40 * MIB, dtype=torch.uint8)
