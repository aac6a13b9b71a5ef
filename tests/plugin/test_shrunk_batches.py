"""Batches that a library made smaller without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch  # noqa: F401  # inner runs in this process must find it imported

if TYPE_CHECKING:
    import pytest

pytest_plugins = ["pytester"]

CODE = """
import torch
from accelerate.utils import find_executable_batch_size


@find_executable_batch_size(starting_batch_size=20)
def train(batch_size):
    return torch.empty(batch_size * 2**20, dtype=torch.uint8, device="cuda").numel()


def test_shrunk():
    assert train() == 14 * 2**20


def test_as_asked():
    find_executable_batch_size(lambda batch_size: torch.ones(1).cuda())()


def test_its_own_way():
    sizes = iter([1])
    own = find_executable_batch_size(
        lambda batch_size: torch.empty(batch_size * 2**24, device="cuda"),
        starting_batch_size=2,
        reduce_batch_size_fn=lambda: next(sizes),
    )
    try:
        own()
    except StopIteration:
        pass
"""


def test_a_shrunk_batch_is_shown(pytester: pytest.Pytester) -> None:
    """Where it began and ended; what did not shrink, or is not known, is not."""
    file = pytester.makepyfile(CODE).name
    options = ("--gpu-card=T4", "--gpu-budget=15MiB", "--gpu-report=json:r.json")

    result = pytester.runpytest(*options)

    result.assert_outcomes(passed=3)
    text = result.stdout.str()
    line = (
        f"{file}::test_shrunk: the batch of train was shrunk from 20 to 14, as memory"
    )
    assert line in text
    assert 1 == text.count("was shrunk from")
    tests = json.loads(Path("r.json").read_text(encoding="utf-8"))["tests"]
    found = [each for test in tests for each in test["shrunk_batches"]]
    assert [{"function": "train", "first": 20, "last": 14}] == found
