"""Warnings of torch point to the line of the user's that they are about."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable


def _leaf() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


#: What warns in C++ below a function that this package has replaced.
CALLS: dict[str, Callable[[], Any]] = {
    "copy": lambda: torch.tensor(torch.ones(2)),
    "copy up": lambda: torch.tensor(torch.ones(2), device="cuda"),
    "copy there": lambda: torch.ones(1, device="cuda").new_tensor(torch.ones(2)),
    "arrays": lambda: torch.tensor([np.ones(2), np.ones(2)]),
    "arrays up": lambda: torch.tensor([np.ones(2), np.ones(2)], device="cuda"),
    "gradient": lambda: (_leaf() * 2).grad,
    "gradient on a card": lambda: (_leaf().cuda() * 2).grad,
    "range": lambda: torch.range(0, 3),
    "sparse": lambda: torch.sparse_csr_tensor(
        torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1)
    ),
    "real": lambda: torch.ones(2, dtype=torch.complex64).to(torch.float32),
    "real, down": lambda: torch.ones(2, dtype=torch.complex64, device="cuda").to(
        "cpu", torch.float32
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_is_given_at_the_callers_line(name: str) -> None:
    """Some are given once in a process: then there is nothing that could be wrong."""
    with simulated_device("T4"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name]()

    assert all(each.filename == __file__ for each in caught), [*map(str, caught)]
    if name in {
        "copy",
        "copy up",
        "copy there",
        "gradient",
        "gradient on a card",
        "range",
    }:
        assert caught


def test_old_ways_to_name_a_type_warn() -> None:
    """Once in a process, or each time if the program has asked for that.

    Source: ``torch/csrc/tensor/python_tensor.cpp``.
    """
    kinds: Any = torch.cuda
    with simulated_device("T4"):
        torch.set_warn_always(True)  # torch's signature
        try:
            for _ in range(2):
                with pytest.warns(UserWarning, match="DtypeTensor constructors are no"):
                    kinds.FloatTensor([0])
                with pytest.warns(UserWarning, match="deprecated as of PyTorch 2.1"):
                    torch.set_default_tensor_type(torch.FloatTensor)
        finally:
            torch.set_warn_always(False)  # torch's signature
