"""Whoever shares a card: other processes, children, workers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

MIB = 2**20
CHILD = """
import torch
kept = torch.empty(48 * 2**20, dtype=torch.uint8, device="cuda")
"""


def _bytes(count: int, device: str = "cuda") -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=device)


def test_alone() -> None:
    _bytes(24 * MIB)


@pytest.mark.max_vram("64MiB", metric="process")
def test_with_its_context() -> None:
    _bytes(24 * MIB)


@pytest.mark.gpu_exclusive
def test_beside_a_tenant(competing_process: Any) -> None:
    with competing_process("15GiB") as tenant:
        told = rf"Process {tenant.pid} has 15\.\d\d GiB memory in use"
        with pytest.raises(torch.OutOfMemoryError, match=told):
            _bytes(2**31)
        tenant.leave()
        _bytes(2**31)


@pytest.mark.max_vram("32MiB", phase="children")
def test_a_child() -> None:
    subprocess.run([sys.executable, "-c", CHILD], check=True)


@pytest.mark.gpu_budget("32MiB")
def test_a_child_under_the_budget() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], check=False, capture_output=True, text=True
    )
    assert "32.00 MiB allowed" in done.stderr


@pytest.mark.requires_vram("9GiB")
@pytest.mark.parametrize("number", range(4))
def test_one_at_a_time(number: int) -> None:
    assert _bytes(9 * 2**30 - (number + 1) * MIB).is_cuda


@pytest.mark.parametrize("number", range(4))
def test_beside_each_other(number: int) -> None:
    _bytes((number + 1) * 20 * MIB)
