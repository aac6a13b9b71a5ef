"""Operators on lists of tensors: foreach, fused optimisers, gradient scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.operators.checks import declared, iterated
from pytest_gpumem.devices.simulated.operators.declarations import declaration_of
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.tensor import Handler

#: The key under which C++ has the code that runs a list element by element.
_ONE_BY_ONE: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _lists(func: Any, handler: Handler) -> Handler:
    """Run lists of several devices element by element, each where its tensors are.

    Source: ``ForeachUtils.h``, ``can_use_fast_route``, and ``ForeachOpsKernels.cpp``.
    """
    names = [each.name for each in func._schema.arguments]
    name = func._schema.name

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        scalars = given.get("scalars")
        if isinstance(scalars, torch.Tensor):
            numbers = _numbers(scalars, len(args[0]))
            return func.overloadpacket(*args[:3], numbers)
        members = [
            each
            for value in given.values()
            if isinstance(value, (list, tuple))
            for each in value
            if isinstance(each, torch.Tensor)
        ]
        cards = {
            each._gpumem_card if isinstance(each, SimulatedTensor) else each.device
            for each in members
        }
        number = given.get("other")
        scales = name.rstrip("_") in _SCALING or kwargs.get("alpha", 1) != 1
        if scales and len(cards) == 1 and isinstance(number, SimulatedTensor):
            _check_number(number, members[0], is_in_place=name.endswith("_"))
        is_one_card = len(cards) == 1 and isinstance(members[0], SimulatedTensor)
        if is_one_card and name == "aten::_foreach_pow":
            _check_powers(args[0], members)
        if is_one_card or torch.device("meta") in cards:
            return handler(args, kwargs)
        return func.redispatch(_ONE_BY_ONE, *args, **kwargs)

    return run


def _check_powers(base: Any, exponents: list[torch.Tensor]) -> None:
    """Refuse powers of one number with booleans, for which a list's kernel has no variant.

    Source: ``ForeachBinaryOpScalar.cu``, ``foreach_scalar_pow_list_kernel_cuda``.

    Raises:
        NotImplementedError: The exponents are booleans (torch's message).
    """
    if not isinstance(base, (list, tuple)) and all(
        each.dtype == torch.bool for each in exponents
    ):
        raise NotImplementedError(
            "\"foreach_binary_op_scalar_cuda\" not implemented for 'Bool'"
        )


def _absolute(func: Any) -> Any:
    """Compute the absolute values of lists of booleans, which the CPU has no kernel for."""

    def compute(tensors: list[torch.Tensor]) -> Any:
        if not func._schema.returns:
            for each in tensors:
                if each.dtype != torch.bool:
                    each.abs_()
            return None
        return [
            each.clone() if each.dtype == torch.bool else each.abs() for each in tensors
        ]

    return compute


_SCALING: Final = ("aten::_foreach_mul", "aten::_foreach_div")


def _check_number(
    number: torch.Tensor, first: torch.Tensor, *, is_in_place: bool
) -> None:
    """Check a number on a card that is applied to each tensor of a list.

    Source: ``ForeachBinaryOpScalarTensor.cu`` and ``ForeachOpsKernels.cpp``.

    Raises:
        RuntimeError: The tensors are on another device (torch's message).
    """
    if not number.dim() and first.device != number.device:
        words = "is expected" if is_in_place else "expected"
        raise RuntimeError(
            f"scalar tensor {words} to be on {first.device} but is on {number.device}"
        )


def _numbers(scalars: torch.Tensor, count: int) -> list[Any]:
    """Return the numbers for the tensors of a list from one tensor of numbers.

    Source: ``ForeachUtils.h``, ``convert_tensor_to_scalar_list``.

    Raises:
        RuntimeError: The tensor is not a contiguous host tensor with one number for
            each (torch's message).
    """
    if not scalars.is_cpu:
        raise RuntimeError(
            f"Expected scalars to be on CPU, got {scalars.device} instead."
        )
    if not scalars.is_contiguous():
        raise RuntimeError("Expected scalars to be contiguous.")
    if scalars.dim() != 1:
        raise RuntimeError(
            "Expected packed scalar Tensor to be of dimension 1. Got "
            f"{scalars.dim()} instead."
        )
    if len(scalars) != count:
        raise RuntimeError(
            f"Expected length of scalars to match input of length {count} but got "
            f"{len(scalars)} instead."
        )
    numbers: list[Any] = scalars.tolist()
    return numbers


register(
    "_foreach_*",
    check=iterated,
    around=_lists,
    source="ForeachUtils.h, can_use_fast_route: no, so element by element",
)

register(
    "_foreach_abs _foreach_abs_",
    check=iterated,
    around=_lists,
    compute=_absolute,
    source="ForeachUnaryOp.cu, foreach_tensor_abs_cuda",
)


def _fused(func: Any, operands: list[Operand]) -> None:
    """Check the devices, unless the learning rate is a tensor."""
    if declaration_of(func).checks_devices:
        declared(func, operands)


register(
    """
    _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_ _fused_adagrad_
    _fused_adam_ _fused_adamw_ _fused_sgd_
    """,
    check=_fused,
    source="native_functions.yaml, device_check",
)
