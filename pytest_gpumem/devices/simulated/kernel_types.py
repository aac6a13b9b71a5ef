"""Types that a card's kernels do not have, though the CPU's may.

A kernel is compiled for the types that its source lists. What it lacks is an error
there, in its own name, and must be one here, where the CPU would compute it.
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
HALVES: Final = frozenset({torch.float16, torch.bfloat16})
COMPLEX: Final = frozenset({torch.complex32, torch.complex64, torch.complex128})


def lacking(
    kernel: str, types: frozenset[torch.dtype]
) -> Callable[[tuple[Any, ...]], str]:
    """Name a kernel where the first operand is of a type that it lacks."""
    return lambda args: kernel if args[0].dtype in types else ""


def with_types(lacks: Callable[[tuple[Any, ...]], str], handler: Handler) -> Handler:
    """Refuse, as a card does, operands of a type that it has no kernel for.

    Source: ``AT_DISPATCH_SWITCH`` of ``aten/src/ATen/Dispatch.h``; nothing is launched
    for a tensor without elements.
    """

    def typed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        kernel = lacks(args)
        if kernel and args[0].numel():
            name = torch.empty(0, dtype=args[0].dtype, device="cpu").type()[6:-6]
            raise NotImplementedError(f"\"{kernel}\" not implemented for '{name}'")
        return handler(args, kwargs)

    return typed


def refuse_backend(func: Any) -> NoReturn:
    """Refuse an operator that has kernels for the CPU alone.

    Source: ``reportError`` of ``aten/src/ATen/core/dispatch/OperatorEntry.cpp``.

    Raises:
        NotImplementedError: Always (the beginning of torch's text).
    """
    __tracebackhide__ = True
    raise NotImplementedError(
        f"Could not run '{func.name()}' with arguments from the 'CUDA' backend. This "
        "could be because the operator doesn't exist for this backend, or was omitted "
        f"during the selective/custom build process (if using custom build). "
        f"'{func.name()}' is only available for these backends: [CPU, Meta]."
    )
