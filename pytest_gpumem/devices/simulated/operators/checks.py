"""Checks the devices of an operator's operands by torch's own rules.

Note [Device checks]
A card's kernel checks its operands in one of two ways; ``native_functions.yaml`` says in
which. Generated code compares all operands with the first one, including single numbers.
Operators marked ``device_check: NoCheck`` use ``TensorIterator``, which accepts a single
host number that is only read (``iterated``), or they have their own check.

A check raises RuntimeError with torch's message.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch._functorch import vmap
from torch.autograd import forward_ad

from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.operators.declarations import declaration_of
from pytest_gpumem.devices.simulated.operators.out_checks import (
    check_outs,
    names_of_outs,
)
from pytest_gpumem.devices.simulated.subclasses import are_transforms_active
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from pytest_gpumem.devices.simulated.operands import Operands
    from pytest_gpumem.devices.simulated.operators.registry import Operator


class Operand:
    """An operand: the name of its argument, whether it is written to, and the tensor."""

    __slots__ = ("device", "is_out", "is_written", "name", "tensor")

    def __init__(self, argument: Any, tensor: torch.Tensor) -> None:
        self.name: str = argument.name
        self.is_out: bool = argument.is_out
        self.is_written = (
            argument.alias_info is not None and argument.alias_info.is_write
        )
        self.tensor = tensor
        self.device = tensor.device


def checking(func: Any, operator: Operator) -> Callable[[Any, Any, Operands], None]:
    """Return a function that checks the devices of an operator's operands.

    The function is called if one operand is on the host or on another card.
    """
    check = operator.check or declared
    is_filled = bool(names_of_outs(func))

    def check_devices(args: Any, kwargs: Any, operands: Operands) -> None:
        if is_filled and not in_backward():
            _check_results(func, _operands_of(func, args, kwargs))
        if operands.strays is None:
            if operator.takes_host or in_backward():
                return
            # For tensors without values, operators that torch composes in C++ create helper
            # tensors on the device that C++ sees.
            host, card = operands.host, operands.card
            if (
                host is not None
                and host.is_meta
                and card
                and card.value_device == "meta"
            ):
                return
        listed = _operands_of(func, args, kwargs)
        if operator.helper is not None and are_formulas_active():
            listed = [
                each
                for each in listed
                if isinstance(each.tensor, SimulatedTensor)
                or not operator.helper(each.name, each.tensor)
            ]
        check(func, listed)

    return check_devices


def _check_results(func: Any, operands: list[Operand]) -> None:
    """Check the devices of ``out=`` where an operator does so itself."""
    outs = [(each.name, each.device) for each in operands if each.is_out]
    sources = [each.device for each in operands if not each.is_out]
    if outs and sources:
        check_outs(func, sources[0], outs)


def are_formulas_active() -> bool:
    """Return whether forward AD or a transform of ``torch.func`` runs in the thread."""
    return (
        forward_ad._current_level >= 0  # no public API
        or are_transforms_active()
        or _is_in_vmap()
    )


def _is_in_vmap() -> bool:
    """Return whether ``vmap`` has called this code.

    While a rule of ``vmap`` runs its operators, C++ takes the transform off its stack,
    so that only Python's stack shows it.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != vmap.__file__:
        frame = frame.f_back
    return frame is not None


def _operands_of(func: Any, args: Any, kwargs: Any) -> list[Operand]:
    """Return the tensors among the arguments, in the schema's order."""
    operands: list[Operand] = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        operands.extend(
            Operand(argument, each)
            for each in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(each, torch.Tensor) and not is_of_formula(each)
        )
    return operands


def is_of_formula(tensor: torch.Tensor) -> bool:
    """Return whether a formula of forward AD has made a tensor.

    Such a tensor has the shape of the other operands and only zeros or only ones: it is
    a missing tangent, or an empty product. It is on the device that C++ sees.

    Source: ``ZeroTensorFallback.cpp``; ``prod_safe_zeros_backward`` of
    ``torch/csrc/autograd/FunctionsManual.cpp``.
    """
    return (
        type(tensor) is torch.Tensor
        and (forward_ad._current_level >= 0 or are_transforms_active())  # no public API
        and tensor.is_cpu
        and _is_expanded(tensor)
        and tensor.untyped_storage().nbytes() == tensor.itemsize
        and bool((tensor == 0).all() or (tensor == 1).all())
    )


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Return whether all elements are one number; new dimensions of 1 have any stride."""
    strides = [
        stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size != 1
    ]
    return not any(strides or tensor.stride())


def declared(func: Any, operands: list[Operand]) -> None:
    """Check as declared: as generated code does, or as ``TensorIterator`` does.

    Source: ``gen_device_check`` and ``wrapper_kernel_sig`` of
    ``torchgen/dest/register_dispatch_key.py``: ``out=`` comes first, and the name includes
    the overload, behind the operator's name if the operator is structured.
    """
    declaration = declaration_of(func)
    if not declaration.checks_devices:
        iterated(func, operands)
        return
    outs = [each for each in operands if each.is_out]
    overload = "" if func._overloadname == "default" else func._overloadname
    name = func.overloadpacket.__name__ + ("_out" if outs else "")
    if not declaration.is_structured:
        name = f"{overload}_{name}"
    elif overload:
        name = f"{name}_{overload}"
    compare_devices(
        name,
        outs + [each for each in operands if not each.is_out],
    )


def check_of(
    name: str, names: tuple[str, ...], order: tuple[int, ...] = ()
) -> Callable[[Any, list[Operand]], None]:
    """Return the check of the operator from which a card composes this one.

    Args:
        name: The kernel that the error names.
        names: That kernel's names of the operands; the last name is used for all
            further operands.
        order: The positions of the operands in that kernel's call; empty means the same
            order.
    """

    def check(_func: Any, operands: list[Operand]) -> None:
        operands = [operands[each] for each in order] if order else operands
        compare_devices(
            name,
            operands,
            [names[min(each, len(names) - 1)] for each in range(len(operands))],
        )

    return check


def compare_devices(
    name: str, operands: list[Operand], names: list[str] | None = None
) -> None:
    """Compare all operands with the first one; an error names the kernel.

    ``names`` are the operands' names, by default the names of their arguments.

    Source: ``common_device_check_failure`` of ``c10/core/impl``.
    """
    first = operands[0].device
    for each, called in zip(
        operands, names or [each.name for each in operands], strict=True
    ):
        if each.device != first:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but got {called} is "
                f"on {each.device}, different from other tensors on {first} (when "
                f"checking argument in method wrapper_CUDA_{name})"
            )


def iterated(func: Any, operands: list[Operand], most: int = 1) -> None:
    """Check as ``TensorIterator`` does, which accepts a single host number.

    ``most`` is the number of host numbers that it accepts.

    Source: ``TensorIteratorBase::compute_types`` of ``aten/src/ATen/TensorIterator.cpp``;
    ``resize_out`` of ``torchgen/dest/register_dispatch_key.py``.
    """
    is_pointwise = torch.Tag.pointwise in func.tags
    if is_pointwise:
        operands = _outs_first(operands)
    card = _card(operands)
    num_read = sum(not each.is_out for each in operands)
    numbers = 0
    for each in operands:
        if each.device == card:
            continue
        is_number = each.device.type == "cpu" and each.tensor.dim() == 0
        if is_number and not each.is_written and num_read > 1:
            numbers += 1
            if numbers > most:
                raise RuntimeError(
                    "Trying to pass too many CPU scalars to non-CPU kernel!"
                )
            continue
        if each.is_out and not is_pointwise:
            raise RuntimeError(
                f"Expected out tensor to have device {card}, but got {each.device} instead"
            )
        refuse_devices(card, each.device)


def _outs_first(operands: list[Operand]) -> list[Operand]:
    """Return operands in the order of a ``TensorIterator``, whose results come first."""
    return sorted(operands, key=lambda each: not each.is_out)


def iterated_reversed(func: Any, operands: list[Operand]) -> None:
    """Check as a ``TensorIterator`` that gets the first two operands in reverse order."""
    iterated(func, operands[1::-1] + operands[2:])


def iterated_without_numbers(_func: Any, operands: list[Operand]) -> None:
    """Check as a ``TensorIterator`` that accepts no host numbers."""
    operands = _outs_first(operands)
    card = _card(operands)
    for each in operands:
        if each.device != card:
            refuse_devices(card, each.device)


def first_operand_only(_func: Any, operands: list[Operand]) -> None:
    """Check only the first operand, which determines the device of the result."""
    card = _card(operands)
    if operands[0].device != card:
        refuse_devices(card, operands[0].device)


def iterated_on_first(func: Any, operands: list[Operand]) -> None:
    """Check as ``TensorIterator`` if the result is on the first operand's device."""
    first_operand_only(func, operands)
    iterated(func, operands)


def _card(operands: list[Operand]) -> torch.device:
    return next(
        each.device for each in operands if isinstance(each.tensor, SimulatedTensor)
    )


def refuse_devices(first: torch.device, other: torch.device) -> NoReturn:
    """Raise the error of ``TensorIterator`` for operands of two devices.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{first} and {other}!"
    )


def in_kernel(_func: Any, operands: list[Operand]) -> None:
    """Check as ``TensorIterator`` before a kernel that accepts no host numbers."""
    iterated(_func, operands)
    for number, each in enumerate(operands, start=1):
        if each.device.type == "cpu":
            raise RuntimeError(
                "iter.device(arg).is_cuda() INTERNAL ASSERT FAILED at "
                '"/__w/pytorch/pytorch/aten/src/ATen/native/cuda/Loops.cuh":118, please '
                f"report a bug to PyTorch. argument {number}: expected a CUDA device but "
                "found cpu"
            )


def check_of_kernel(
    name: str, names: tuple[str, ...]
) -> Callable[[Any, list[Operand]], None]:
    """Return a check by the kernel that writes the result of this operator."""
    compare = check_of(name, names)

    def check(func: Any, operands: list[Operand]) -> None:
        is_own = func._overloadname == "default"
        (compare if is_own else declared)(func, operands)

    return check
