"""Operators with one tensor on another device pass or fail as in PyTorch's CUDA code."""

from __future__ import annotations

from typing import Final

import misplaced_calls
import pytest
import torch

from pytest_gpumem import simulated_device

#: Calls for which a card and the simulated one differ, and why.
DIFFERING: Final[dict[str, tuple[str, ...]]] = {
    "C++ composes the operator for ``meta``, and names the host in place of the card": (
        "diff out 0 meta",
        "gradient 0 meta",
        "gradient 1 meta",
        "gradient 2 meta",
        "take_along_dim 0 meta",
        "take_along_dim 1 meta",
        "take_along_dim out 0 meta",
        "inner 0 meta",
        "inner 1 meta",
        "inner out 0 meta",
        "tensordot out 0 meta",
        "linalg.vecdot out 0 meta",
        "linalg.matrix_power out 0 meta",
        "linalg.multi_dot 0 meta",
        "linalg.multi_dot 1 meta",
        "linalg.multi_dot 2 meta",
        "linalg.multi_dot 3 meta",
        "linalg.multi_dot 4 meta",
        "linalg.multi_dot out 0 meta",
        "linalg.norm out 0 meta",
        "linalg.norm.subgradients_at_zero out 0 meta",
        "linalg.matrix_norm out 0 meta",
        "special.ndtr out 0 meta",
    ),
    "both refuse, in other words": (
        "logaddexp 0 meta",
        "logaddexp2 0 meta",
        "nn.functional.cosine_similarity 1 meta",
        "index_fill 0 meta",
        "index_fill _0 meta",
        "_unsafe_masked_index_put_accumulate 0 cuda:1",
        "nn.functional.ctc_loss 1 meta",
        "nn.functional.ctc_loss 2 meta",
        "nn.functional.ctc_loss 3 meta",
    ),
    "sparse tensors are refused by name": (
        "to_sparse right",
        "to_sparse 0 cuda:1",
    ),
    "a composition of Python with ``meta``, which is refused here": (
        "nn.functional.linear_cross_entropy.chunked 0 meta",
        "nn.functional.linear_cross_entropy.chunked 2 meta",
    ),
}
#: Every how many operators are tried daily.
_DAILY: Final = 4

VERSION, CALLS = misplaced_calls.load()

pytestmark = pytest.mark.skipif(
    torch.__version__.partition("+")[0] != VERSION,
    reason=f"recorded with torch {VERSION}",
)


def _different(names: list[str]) -> set[str]:
    """Return the calls of operators about which the simulated card says something else.

    None of them passes here and fails on a card.
    """
    with simulated_device("A100-40GB*2"):
        said = {name: misplaced_calls.said_of(name) for name in names}
    different = set()
    for name in names:
        for key, text in CALLS[name].items():
            found = said[name].get(key, "")
            if found != text:
                different.add(f"{name} {key}")
                passes = found.startswith("no error") > text.startswith("no error")
                assert not passes, f"{name} {key} passes, and a card says {text}"
    return different


def _listed(names: list[str]) -> set[str]:
    """Return the calls of operators that are on the list above."""
    every = {f"{name} {key}" for name in names for key in CALLS[name]}
    return every & {call for calls in DIFFERING.values() for call in calls}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([*CALLS][::_DAILY], id="some"),
        *(
            pytest.param([*CALLS][start::_DAILY], id=f"{start}", marks=pytest.mark.slow)
            for start in range(1, _DAILY)
        ),
    ],
)
def test_a_misplaced_tensor_is_refused_as_on_a_card(names: list[str]) -> None:
    """In each place of each operator; what differs is on the list, and nothing else."""
    assert _different(names) == _listed(names)


def test_what_differs_was_recorded() -> None:
    """The list above names recorded calls."""
    listed = {call for calls in DIFFERING.values() for call in calls}
    assert listed <= {f"{name} {key}" for name in CALLS for key in CALLS[name]}
