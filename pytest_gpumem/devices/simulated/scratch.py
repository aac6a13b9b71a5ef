"""Memory that CUDA's operators take inside themselves, while they run.

A rule is a function from an operator's arguments to the sizes that it asks for once
its results are there; the bytes are held until the operator is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.memory import Memory
from pytest_gpumem.model.reductions import Processors, scratch_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.tensor import Handler

    Rule = Callable[[SimulatedCard, tuple[Any, ...], dict[str, Any]], tuple[int, ...]]

#: Accumulators of half precision are of single precision.
#: Source: ``at::opmath_type``.
_OPMATH_BYTES: Final = {torch.float16: 4, torch.bfloat16: 4}


def _reduction(
    card: SimulatedCard, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, ...]:
    """``sum``, ``mean`` and their like: see ``model.reductions``."""
    operand = args[0]
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = [dims]
    count = operand.dim()
    if not isinstance(dims, (list, tuple)) or not dims:
        reduced = list(range(count))
    else:
        reduced = [dim % count for dim in dims] if count else []
    dtype = operand.dtype
    is_whole = not dtype.is_floating_point and not dtype.is_complex
    # Whole numbers are added up as int64.
    element_bytes = 8 if is_whole else _OPMATH_BYTES.get(dtype, dtype.itemsize)
    processors = Processors(
        card.card.multi_processor_count, card.card.max_threads_per_multi_processor
    )
    return scratch_bytes(
        operand.shape, operand.stride(), reduced, element_bytes, processors
    )


#: By packet name. Source: the callers of ``gpu_reduce_kernel``.
RULES: Final[dict[str, Rule]] = {
    "sum": _reduction,
    "nansum": _reduction,
    "mean": _reduction,
    "prod": _reduction,
}


def with_scratch(name: str, handler: Handler) -> Handler:
    """Return a handler that also holds what the operator takes inside itself."""
    rule = RULES.get(name)
    if rule is None:
        return handler

    def holding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        out = handler(args, kwargs)
        card = getattr(out, "_card", None)
        if card is not None:
            held = [Memory(card, nbytes) for nbytes in rule(card, args, kwargs)]
            del held
        return out

    return holding
