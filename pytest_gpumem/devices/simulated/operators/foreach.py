"""Operators on lists of tensors: foreach, fused optimisers, gradient scaling."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.operators.checks import iterated
from pytest_gpumem.devices.simulated.operators.registry import register

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.tensor import Handler


def _elements(func: Any, places: list[Operand]) -> None:
    """Check the elements as ``TensorIterator`` does; ``scalars`` are read on the host."""
    iterated(func, [each for each in places if each.name != "scalars"])


def _one_by_one(func: Any, handler: Handler) -> Handler:
    """Run lists whose tensors are on several devices element by element.

    Devices are then compared for each element alone.
    """

    def listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = list(zip(func._schema.arguments, args, strict=False))
        for argument, each in named:
            if argument.name == "scalars" and getattr(each, "is_cuda", False):
                raise RuntimeError(
                    f"Expected scalars to be on CPU, got {each.device} instead."
                )
        lists = [each for each in args if isinstance(each, (list, tuple))]
        length = len(lists[0])
        if length == 1 or _are_together(lists):
            return handler(args, kwargs)
        results: list[torch.Tensor] = []
        for index in range(length):
            chosen = [
                each[index : index + 1] if _has_elements(argument, each) else each
                for argument, each in named
            ]
            results += func(*chosen, **kwargs) or ()
        return results if func._schema.returns else None

    return listed


def _are_together(lists: list[Any]) -> bool:
    """Return whether all tensors of lists are on one device."""
    tensors = (each for each in chain(*lists) if isinstance(each, torch.Tensor))
    return len({each.device for each in tensors}) <= 1


def _has_elements(argument: Any, value: Any) -> bool:
    """Return whether an argument has an element for each tensor: a list, or ``scalars``."""
    return isinstance(value, (list, tuple)) or argument.name == "scalars"


def _copying(_func: Any, handler: Handler) -> Handler:
    """Copy lists whose tensors are on several devices element by element."""

    def listed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        targets, sources, *rest = args
        if len(targets) != len(sources) or _are_together([targets, sources]):
            handler(args, kwargs)
            return
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, *rest, **kwargs)

    return listed


_SLOW = "ForeachOpsKernels.cpp; ForeachUtils.h, can_use_fast_route, convert_tensor_to_scalar_list"
register("_foreach_*", check=_elements, around=_one_by_one, source=_SLOW)
register("_foreach_copy_", around=_copying, source=_SLOW)
register(
    """
    _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_ _fused_adagrad_
    _fused_adam_ _fused_adamw_ _fused_sgd_
    """,
    takes_host=True,
    source="native_functions.yaml, device_check: NoCheck",
)
