"""Operators that draw random numbers.

That an operator draws is no field of its record: torch's own tag
``nondeterministic_seeded`` says it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pytest_gpumem.devices.simulated.kernel_types import INTEGERS, lacking
from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import Results

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, Step


def dropout(source: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: FBT001  # the operator's signature
    """``dropout``: on a card one kernel, which keeps a mask of one byte a number."""
    if not train or p == 0 or source.numel() == 0:
        return source
    if p == 1:
        return source * torch.zeros_like(source)
    result: torch.Tensor = torch.ops.aten.native_dropout.default(source, p, train)[0]
    return result


def _mask_first(_call: Call) -> Iterator[Step]:
    yield Results(1)


register(
    "native_dropout",
    requests=_mask_first,
    source="cuda/Dropout.cu, dropout_cuda",
)
register(
    "dropout",
    composed=only(dropout),
    source="Dropout.cpp, is_fused_kernel_acceptable",
)
# Its bound is the host's: "high must be a scalar tensor and on CPU".
register("randint_like", takes_host=True, source="TensorFactories.cpp, randint_like")
register(
    "native_dropout_backward",
    lacks=lacking("masked_scale", INTEGERS),
    source="cuda/Dropout.cu, dropout_backward_cuda",
)
