"""Wrong calls fail as in PyTorch's own CUDA code: the class of the error, and its text."""

from __future__ import annotations

from typing import Final

import pytest
import torch
import wrong_calls

from pytest_gpumem import simulated_device

#: Operators in dtypes for which a card and the simulated one differ, and why.
DIFFERING: Final = {
    "the recording had no values, and stopped at a check of them": (
        "_segment_reduce.lengths complex64",
        "_segment_reduce.lengths int64",
        "_segment_reduce.lengths bool",
        "linalg.eig float16",
        "linalg.eig bfloat16",
        "normal int64",
        "normal bool",
    ),
    "sparse tensors are refused by name": (
        "sparse.mm.reduce complex64",
        "sparse.mm.reduce int64",
        "sparse.mm.reduce bool",
        "sparse.sampled_addmm float16",
        "sparse.sampled_addmm bfloat16",
        "sparse.sampled_addmm int64",
        "sparse.sampled_addmm bool",
    ),
    "only a card's kernel takes these numbers; here they are refused": (
        "nn.functional.adaptive_avg_pool3d complex64",
        "nn.functional.adaptive_avg_pool3d int64",
        "nn.functional.adaptive_avg_pool3d bool",
        "nn.functional.rrelu float16",
    ),
    "both refuse, in other words": (
        "_softmax_backward_data complex64",
        "_softmax_backward_data int64",
        "_softmax_backward_data bool",
        "aminmax complex64",
        "bernoulli complex64",
        "bernoulli int64",
        "bernoulli bool",
        "fft.ihfft2 complex64",
        "fft.ihfftn complex64",
        "histc float16",
        "histogram float16",
        "histogram bfloat16",
        "histogram complex64",
        "histogram int64",
        "histogram bool",
        "histogramdd float16",
        "histogramdd bfloat16",
        "histogramdd complex64",
        "histogramdd int64",
        "histogramdd bool",
        "linalg.lu_solve float16",
        "linalg.lu_solve bfloat16",
        "lu_solve float16",
        "lu_solve bfloat16",
        "nn.functional.embedding_bag complex64",
        "nn.functional.embedding_bag int64",
        "nn.functional.embedding_bag bool",
        "stft int64",
    ),
}

VERSION, CALLS, TYPES = wrong_calls.load()

pytestmark = pytest.mark.skipif(
    torch.__version__.partition("+")[0] != VERSION,
    reason=f"recorded with torch {VERSION}",
)


def test_wrong_calls_fail_as_on_a_card() -> None:
    """Devices, dtypes and shapes that people mix up; there is no exception."""
    with simulated_device("A100-40GB"):
        assert wrong_calls.said_of_calls() == CALLS


def test_an_operator_refuses_what_a_cards_kernel_refuses() -> None:
    """Each operator of PyTorch's database, in the dtypes that a kernel lacks.

    What differs is on the list above, and nothing else is on it.
    """
    with simulated_device("A100-40GB"):
        said = wrong_calls.said_of_types(lambda name: name in TYPES)

    different = {name for name, text in TYPES.items() if said[name] != text}
    listed = [name for names in DIFFERING.values() for name in names]
    assert sorted(listed) == sorted(different)
