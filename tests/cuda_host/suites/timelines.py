"""Tests whose timelines are told: models of a fixture and of a test, gradients, a peak."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model for several tests."""
    return nn.Sequential(nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 256)).cuda()


def test_a_peak_by_lines() -> None:
    """A large tensor comes and goes before a small one."""
    large = torch.empty(3 * 2**20, device="cuda")
    small = torch.empty(2**20, device="cuda")
    del large
    del small
    torch.empty(2**18, device="cuda")


def test_a_fixtures_model(model: nn.Module) -> None:
    """It was moved before the test, and lives after it."""
    with torch.no_grad():
        model(torch.empty(512, 1024, device="cuda"))


def test_a_fixtures_model_again(model: nn.Module) -> None:
    """What was there before the test has its names all the same."""
    with torch.no_grad():
        model(torch.empty(64, 1024, device="cuda"))


def test_a_step(model: nn.Module) -> None:
    """A forward, a backward, a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.empty(64, 1024, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_no_card() -> None:
    """It has no timeline."""
