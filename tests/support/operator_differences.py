"""Intended differences between the simulated card and the CPU, each with its reason.

The list is complete: a difference that is not in it fails, and so does an entry that is no
longer needed. This module does not import torch.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: The release of torch that the list is for, which ``tox.ini`` names.
RELEASE: Final = "2.13."

#: What a comparison comes to, from the best to the worst.
EQUAL: Final = "equal"
CLOSE: Final = "within tolerance"
REFUSED: Final = "refused"
DIFFERS: Final = "differs"
LEVELS: Final = (EQUAL, CLOSE, REFUSED, DIFFERS)


class Finding(NamedTuple):
    """The samples of one operator, type and way that came to one level.

    Attributes:
        operator: The name of the operator, module or optimiser in its database.
        dtype: The type's name, without ``torch.``; empty for wrong inputs.
        way: How it was run: ``forward``, ``gradient``, ``out= strided`` …
        level: One of ``LEVELS``.
        samples: How many.
        text: What the first of them differs in.
    """

    operator: str
    dtype: str
    way: str
    level: str
    samples: int
    text: str


class Difference(NamedTuple):
    """What is known to differ, and why.

    Attributes:
        operators: Names in the databases, between blanks.
        level: Which of ``LEVELS`` it comes to.
        reason: Why it is so.
        ways: Patterns of the ways, between semicolons; empty for all.
        types: The types, between blanks; empty for all.
    """

    operators: str
    level: str
    reason: str
    ways: str = ""
    types: str = ""

    def fits(self, finding: Finding) -> bool:
        """Tell whether a finding is meant."""
        return (
            finding.level == self.level
            and finding.operator in self.operators.split()
            and (not self.types or finding.dtype in self.types.split())
            and (
                not self.ways
                or any(
                    fnmatchcase(finding.way, each.strip())
                    for each in self.ways.split(";")
                )
            )
        )


DIFFERENCES: Final = (
    Difference(
        "sparse_mm_reduce sparse_sampled_addmm to_sparse SparseAdam",
        REFUSED,
        "sparse tensors are not simulated",
    ),
    Difference(
        """
        jiterator_2inputs_2outputs jiterator_4inputs_with_extra_args jiterator_binary
        jiterator_binary_return_by_ref jiterator_unary
        """,
        REFUSED,
        "their kernels are CUDA's source text, which is compiled for a card",
    ),
    Difference(
        """
        fft_fft fft_fft2 fft_fftn fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2
        fft_ifftn fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft
        fft_rfft2 fft_rfftn
        """,
        REFUSED,
        "cuFFT alone transforms in half precision; the CPU has no kernel for it",
        ways="card's type; card's gradient",
        types="float16",
    ),
    Difference(
        "stft",
        REFUSED,
        "cuFFT alone transforms in half precision; the CPU has no kernel for it",
        ways="type",
        types="float16",
    ),
    Difference(
        """
        torch_ops_aten__efficient_attention_forward
        torch_ops_aten__flash_attention_forward
        """,
        REFUSED,
        "internal names of CUDA's kernels; use `scaled_dot_product_attention`",
        ways="card's type; card's gradient; type",
    ),
    Difference(
        "torch_ops_aten__efficient_attention_forward",
        DIFFERS,
        "dropout's seed and offset are on the host, as they are with a card: Note [Seed and "
        "Offset Device] of `transformers/cuda/attention.cu`",
        ways="card's type",
    ),
    Difference(
        "linalg_lu linalg_lu_factor linalg_lu_factor_ex",
        REFUSED,
        "only a card decomposes without exchanging rows (`pivot=False`)",
        ways="forward; gradient",
        types="float32 complex64",
    ),
    Difference(
        "nn_functional_rrelu",
        REFUSED,
        "the CPU draws no slopes in half precision",
        ways="card's type; card's gradient",
        types="float16",
    ),
    Difference(
        "narrow_copy",
        DIFFERS,
        "a card has no kernel for `narrow_copy.out`, so torch's error is raised",
        ways="out=*",
    ),
    Difference(
        "nn_functional_max_unpool2d nn_functional_max_unpool2d_grad",
        DIFFERS,
        "a card's kernel stores its result row by row for any layout of its input: "
        "`max_unpooling2d_forward_out_cuda`",
        ways="forward",
        types="float32 float16 bfloat16",
    ),
    Difference(
        "histogramdd",
        DIFFERS,
        "a card has no kernel, and torch raises this error before it checks the input",
        ways="wrong input",
    ),
    Difference(
        "median",
        DIFFERS,
        "the limit of 25 dimensions of CUDA's kernels is not simulated",
        ways="wrong input",
    ),
    Difference(
        """
        nn_functional_linear_cross_entropy_chunked
        nn_functional_linear_cross_entropy_chunked_none
        """,
        CLOSE,
        "on a card it requests products in float32 (`out_dtype=`), on the CPU it does "
        "not",
        types="float16 bfloat16",
    ),
    Difference(
        """
        nn_functional_linear_cross_entropy_chunked
        nn_functional_linear_cross_entropy_chunked_none
        """,
        DIFFERS,
        "on a card it requests products in float32 (`out_dtype=`): rounding in half "
        "precision exceeds the tolerance",
        ways="forward; gradient",
        types="float16 bfloat16",
    ),
    Difference(
        "nn_LinearCrossEntropyLoss",
        CLOSE,
        "torch's Python code uses other products on a card: `is_cuda` in "
        "`nn/modules/linear_cross_entropy.py`",
        ways="moved; copied",
    ),
    Difference(
        "nn_LinearCrossEntropyLoss",
        DIFFERS,
        "torch's Python code uses other products on a card (`is_cuda` in "
        "`nn/modules/linear_cross_entropy.py`): rounding in half precision exceeds the "
        "tolerance",
        ways="moved; copied",
        types="float16",
    ),
    Difference(
        "nn_functional_scaled_dot_product_attention",
        DIFFERS,
        "a card's memory-efficient kernel stores its result head by head, and draws "
        "dropout in another order",
        ways="forward; gradient",
    ),
    Difference(
        "matmul __rmatmul__",
        CLOSE,
        "if one operand has no batch, C++ computes one product (`mm`) for a subclass "
        "of Tensor, and many (`bmm`) otherwise: `isTensorSubclassLike` in "
        "`LinearAlgebra.cpp`",
        types="complex64 float32",
    ),
    Difference(
        "matmul",
        DIFFERS,
        "if one operand has no batch, C++ computes one product for a subclass of "
        "Tensor, and cannot write it to a strided `out=`",
        ways="out= strided",
    ),
    Difference(
        "cumprod",
        CLOSE,
        "for a subclass of Tensor, C++ uses the formula of the gradient that handles "
        "zeros",
        ways="gradient",
    ),
    Difference(
        "renorm",
        CLOSE,
        "a card accumulates in single precision, the CPU in double: `renorm_backward` "
        "of `FunctionsManual.cpp`",
        ways="gradient",
        types="float32 complex64",
    ),
    Difference(
        "renorm",
        DIFFERS,
        "the same: in double precision the CPU finds no number that equals the largest "
        "one, and divides by zero",
        ways="gradient",
        types="complex64",
    ),
    Difference(
        "_softmax_backward_data",
        DIFFERS,
        "a card's kernel narrows to half precision, which the CPU's refuses",
        ways="forward; gradient",
        types="float32",
    ),
    Difference(
        "ASGD Adam AdamW Adamax NAdam RMSprop",
        CLOSE,
        "`capturable=True` exists only on a card, where step counts are tensors; it is "
        "compared with `capturable=False`",
    ),
)


def listed(finding: Finding) -> int | None:
    """Return the place of the entry that a finding is meant by, or None."""
    return next(
        (place for place, each in enumerate(DIFFERENCES) if each.fits(finding)), None
    )


def unused(findings: Iterable[Finding]) -> Iterator[tuple[Difference, str]]:
    """Yield each entry and name of it for which there was no finding."""
    found = list(findings)
    for each in DIFFERENCES:
        for name in each.operators.split():
            if not any(one.operator == name and each.fits(one) for one in found):
                yield each, name
