"""Embeddings hold what CUDA's kernels hold, and are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from pytest_gpumem import PeakRecorder
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.kernels.embedding_memory import add_to_rows, parts
from pytest_gpumem.kernels.reduction_memory import Processors
from pytest_gpumem.kernels.sort_memory import (
    pairs_bytes,
    scan_by_key_bytes,
    unique_bytes,
)

A100 = Processors(count=108, max_threads=2048)


@pytest.mark.parametrize(
    ("count", "rows", "width"),
    [(8192, 272, 64), (8192, 128, 1888), (40_000, 431, 1024), (40_000, 128, 3424)],
)
def test_parts_are_added_to_few_rows(count: int, rows: int, width: int) -> None:
    """As PyTorch's host code decides, which was asked on both sides of each limit."""
    assert add_to_rows(count, rows, width, A100)
    if width in {64, 1024}:
        assert not add_to_rows(count, rows + 1, width, A100)
    else:
        assert not add_to_rows(count, rows, width + 32, A100)


def test_rows_are_made_of_parts() -> None:
    """A thread adds ten rows; no more rows than indices have a gradient."""
    assert (256, 1075) == parts(8192, 256)
    assert (100, 110) == parts(100, 30_522)


@pytest.mark.parametrize(
    ("capability", "count", "unique", "sums"),
    [
        ((7, 5), 5120, 1279, 1279),
        ((7, 5), 5121, 1535, 1279),
        ((8, 0), 21_504, 1279, 1279),
        ((8, 0), 21_505, 1535, 1279),
        ((8, 6), 5121, 1535, 1279),
        ((9, 0), 78_849, 1535, 2047),
    ],
)
def test_bytes_of_sorted_keys(
    capability: tuple[int, int], count: int, unique: int, sums: int
) -> None:
    """By compute capability, at the limits of a tile of tiles."""
    card = Processors(108, 2048, capability)

    assert unique == unique_bytes(count, 8, card)
    assert sums == scan_by_key_bytes(count, 8, card)


def test_sorts_are_tuned_by_capability() -> None:
    """What CUB asks for to sort ten million keys of eight bytes by all their bits."""
    sizes = [
        pairs_bytes(10_000_000, 8, 64, Processors(108, 2048, capability)) // 1024
        for capability in ((7, 5), (8, 0), (9, 0))
    ]

    assert [159_818, 158_871, 158_437] == sizes


def test_a_gradient_of_many_indices() -> None:
    """It sorts them, and lays parts of rows down before they are added up."""
    weight = torch.randn(30_522, 64)
    indices = torch.arange(4096).view(8, 512) * 7 % 30_522
    expected = torch.autograd.grad(
        functional.embedding(indices, weight.requires_grad_()).sum(), weight
    )[0]
    with simulated_device("A100-40GB"):
        there = weight.detach().cuda().requires_grad_()
        loss = functional.embedding(indices.cuda(), there).sum()
        with PeakRecorder() as recorder:
            found = torch.autograd.grad(loss, there)[0]
        figures = recorder.figures
        more = figures.peak_allocated_bytes - figures.start_allocated_bytes
        rows, of_parts = parts(4096, 30_522)
        counts = [4096, 4096, 4096, rows, rows, of_parts, 1, 1]
        numbers = sum(-(-8 * each // 512) * 512 for each in counts)
        widths = 64 * 4
        laid = 4096 * widths + 512  # the gradient of a sum lies in no row

        assert torch.equal(expected, found.cpu())
        assert more == (
            found.nbytes + -(-of_parts * widths // 512) * 512 + numbers + laid
        )


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_return_what_a_card_returns(mode: str) -> None:
    """Of each index its bag, of each bag its size without padding."""
    modes = {"sum": 0, "mean": 1, "max": 2}
    weight = torch.randn(10, 3)
    indices = torch.tensor([1, 2, 4, 5, 4, 3])
    offsets = torch.tensor([0, 2, 2])
    bag: Any = torch.ops.aten._embedding_bag.default
    expected = bag(weight, indices, offsets, False, modes[mode], False, None, False, 4)
    with simulated_device("A100-40GB"):
        operands = [each.cuda() for each in (weight, indices, offsets)]
        output, bags, sizes, largest = bag(
            *operands, False, modes[mode], False, None, False, 4
        )

        assert torch.equal(expected[0], output.cpu())
        assert [0, 0, 2, 2, 2, 2] == bags.tolist()
        assert [2, 0, 2] == sizes.tolist()
        assert (9 if mode == "max" else 0) == largest.numel()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_gradients_of_bags(mode: str) -> None:
    """They are the CPU's."""
    weight = torch.randn(10, 3, requires_grad=True)
    indices = torch.tensor([[1, 2, 4], [5, 4, 3]])
    loss = functional.embedding_bag(indices, weight, mode=mode).pow(2).sum()
    expected = torch.autograd.grad(loss, weight)[0]
    with simulated_device("A100-40GB"):
        there = weight.detach().cuda().requires_grad_()
        loss = functional.embedding_bag(indices.cuda(), there, mode=mode).pow(2).sum()

        assert torch.equal(expected, torch.autograd.grad(loss, there)[0].cpu())
