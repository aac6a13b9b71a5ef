"""Dtypes that a card's kernels do not support, although the CPU's may.

A kernel is compiled for the dtypes that its source lists. For any other dtype a card
raises an error that names the kernel. The simulated card must raise the same error, even
if the CPU can compute the operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.tensor import Handler

INTEGERS: Final = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
)
#: Floating types of 8 bits.
SMALL_FLOATS: Final = frozenset(
    {
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
    }
)
HALVES: Final = frozenset({torch.float16, torch.bfloat16})
#: Operators whose kernels for complex numbers of half precision only a card has.
#: Source: the operators with ``torch.chalf`` in ``dtypesIfCUDA`` and not in ``dtypes`` of
#: ``torch/testing/_internal/common_methods_invocations.py``.
COMPLEX_HALVES: Final = frozenset(
    [
        "acos",
        "acosh",
        "angle",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cos",
        "cosh",
        "div",
        "exp",
        "lerp",
        "log",
        "logaddexp",
        "nansum",
        "pow",
        "prod",
        "rsqrt",
        "sigmoid",
        "sin",
        "sinh",
        "sqrt",
        "sum",
        "tan",
        "tanh",
        "trace",
    ]
)
COMPLEX: Final = frozenset({torch.complex32, torch.complex64, torch.complex128})


def type_name(dtype: torch.dtype) -> str:
    """Return the name that C++ prints for a dtype, such as ``"Half"``."""
    return torch.empty(0, dtype=dtype, device="cpu").type()[6:-6]


def require_type(dtype: torch.dtype, *tensors: torch.Tensor | None) -> None:
    """Refuse tensors of another dtype than a card's kernel has for all its operands.

    Source: ``TensorBase::const_data_ptr`` of ``aten/src/ATen/core/TensorMethods.cpp``.

    Raises:
        RuntimeError: With torch's message.
    """
    for each in tensors:
        if each is not None and each.dtype != dtype:
            raise RuntimeError(
                f"expected scalar type {type_name(dtype)} but found "
                f"{type_name(each.dtype)}"
            )


def lacking(
    kernel: str, types: frozenset[torch.dtype]
) -> Callable[[tuple[Any, ...]], str]:
    """Return a rule that names a kernel if it lacks the first operand's dtype."""
    return lambda args: kernel if args[0].dtype in types else ""


def with_types(
    lacks: Callable[[tuple[Any, ...]], str],
    handler: Handler,
    check: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
) -> Handler:
    """Refuse operands of a dtype for which a card has no kernel.

    Source: ``AT_DISPATCH_SWITCH`` of ``aten/src/ATen/Dispatch.h``. For a tensor without
    elements, no kernel is launched.

    Args:
        lacks: Takes the arguments and returns the name of the missing kernel; empty if
            the kernel exists.
        handler: Runs the operator.
        check: Makes the checks that a card makes before it chooses a kernel.
    """

    def typed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kernel = lacks(args)
        if kernel and args[0].numel():
            if check is not None:
                check(args, kwargs)
            raise NotImplementedError(
                f"\"{kernel}\" not implemented for '{type_name(args[0].dtype)}'"
            )
        return handler(args, kwargs)

    return typed


def check_shapes(func: Any, args: tuple[Any, ...]) -> None:
    """Check the shapes of an operator whose operands all have one kind of dtype.

    A card checks them before it chooses a kernel.

    Raises:
        RuntimeError: The shapes do not match (torch's message).
    """
    zero = torch.zeros((), device="cpu")
    func(
        *(
            zero.expand(each.shape) if isinstance(each, torch.Tensor) else each
            for each in args
        )
    )


def refuse_backend(func: Any) -> NoReturn:
    """Refuse an operator that has kernels only for the CPU.

    Source: ``reportError`` of ``aten/src/ATen/core/dispatch/OperatorEntry.cpp``.

    Raises:
        NotImplementedError: Always (the beginning of torch's message).
    """
    raise NotImplementedError(
        f"Could not run '{func.name()}' with arguments from the 'CUDA' backend. This "
        "could be because the operator doesn't exist for this backend, or was omitted "
        f"during the selective/custom build process (if using custom build). "
        f"'{func.name()}' is only available for these backends: [CPU, Meta]."
    )
