"""The step by which an operator that draws advances its generator's offset on a card.

Each rule is a value for the field ``move`` in ``registry.py``. It is called when the
results exist.

Source, unless a rule names another: ``DistributionTemplates.h`` of
``aten/src/ATen/native/cuda``. The rules are compared with the results of torch 2.13's
CUDA code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.kernels.random_numbers import (
    by_grid,
    by_iterator,
    by_permutation,
    by_rows,
    rounded,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.operators.requests import Call


def for_a_constant(count: int) -> Callable[[Call], int]:
    """Return the rule of a kernel in which each thread may draw ``count`` numbers."""
    return lambda _call: rounded(count)


def _numbers(call: Call) -> tuple[int, int, int]:
    """Return the count and bytes of the filled numbers, and the draws per call."""
    filled: Any = call.results[0]
    count, size = filled.numel(), filled.itemsize
    if filled.is_complex():  # filled as real numbers
        count, size = 2 * count, size // 2
    is_double = filled.dtype in {torch.float64, torch.complex128}
    return count, size, 2 if is_double else 4


def for_each(call: Call) -> int:
    """Return the step for an operator that draws every element of a tensor."""
    return by_iterator(*_numbers(call), call.processors)


#: A draw from at least this many integers takes 64 bits.
#: Source: ``random_from_to_kernel``.
_WIDE: Final = 2**28


def for_integers(call: Call) -> int:
    """Return the step for integers, by the size of the range or by the dtype."""
    count, size, _at_once = _numbers(call)
    filled: Any = call.results[0]
    first = call.get("from", call.get("low"))
    end = call.get("to", call.get("high"))
    if isinstance(end, torch.Tensor):
        end = int(end)
    if first is None and end is None:
        is_wide = filled.dtype in {torch.int64, torch.float64}
    else:
        end = _end_of(filled.dtype) if end is None else end
        is_wide = end - (first or 0) >= _WIDE
    return by_iterator(count, size, 2 if is_wide else 4, call.processors)


def _end_of(dtype: torch.dtype) -> int:
    """Return one more than the last integer that a dtype represents without gaps.

    Source: ``random_from_to`` of ``aten/src/ATen/native/DistributionTemplates.h``.
    """
    if dtype is torch.bool:
        return 2
    if dtype.is_floating_point:
        return round(2 / torch.finfo(dtype).eps) + 1
    return torch.iinfo(dtype).max + 1


def for_shares(call: Call) -> int:
    """Return the step for ``bernoulli``; constant if the probabilities are a tensor."""
    filled: Any = call.results[0]
    share = call.get("p")
    if isinstance(share, float):
        return for_each(call)
    return rounded(10) if filled.numel() else 0


def for_samples(call: Call) -> int:
    """Return the step for ``multinomial``, with or without replacement."""
    source: torch.Tensor = call["self"]
    if call["replacement"] and call["num_samples"] > 1:
        return by_rows(source.shape[0] if source.dim() > 1 else 1)
    at_once = 2 if source.dtype is torch.float64 else 4
    return by_iterator(source.numel(), source.itemsize, at_once, call.processors)


def for_permutation(call: Call) -> int:
    """Return the step for a permutation."""
    filled: Any = call.results[0]
    return by_permutation(filled.numel(), call.processors)


def for_mask(call: Call) -> int:
    """Return the step for the mask of dropout."""
    source: torch.Tensor = call["input"]
    is_drawn = call["train"] is not False
    return by_grid(source.numel(), 4, call.processors) if is_drawn else 0


def for_slopes(call: Call) -> int:
    """Return the step for random slopes (``rrelu``)."""
    source: torch.Tensor = call["self"]
    at_once = 2 if source.dtype is torch.float64 else 4
    is_drawn = call["training"]
    return by_grid(source.numel(), at_once, call.processors) if is_drawn else 0
