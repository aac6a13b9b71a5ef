"""One record for each operator: all that the simulated card needs to know about it.

An operator without special needs has no record: it runs on CPU tensors, and memory is
allocated for its results in their order. Three facts are read from torch's own files and
tags: whose devices are compared, what autocast does, and which operators draw random
numbers. Everything else that an operator needs is one row in the module of its family::

    register("ctc_loss_backward", alert="ctc_loss_backward_gpu", source="LossCTC.cu")

A row names an operator as in ``torch.ops.aten`` and applies to all its overloads. It
also applies to the in-place variant (``add`` means ``add`` and ``add_``), unless that
variant has its own row. The row ``_foreach_*`` applies to every operator with this
prefix that has no row of its own. A name in two rows is an error at import. A name that
the installed torch does not have is ignored.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep
    from pytest_gpumem.devices.simulated.rng import Drawing
    from pytest_gpumem.devices.simulated.tensor import Handler

    Kernel = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """The record of one operator, or of several operators with the same rules.

    Attributes:
        source: The source of the record in PyTorch's sources: file and function, or the
            field of ``native_functions.yaml``.
        defined_at: The module and line of the row.
        requests: The rule for the operator's requests to the allocator, see
            ``requests.py``; None if it requests only its results.
        compute: Takes an overload and returns the function that computes its values on
            the CPU, if the CPU's kernel lacks a feature of the card's kernel. The
            function takes the arguments of the overload. None for an overload that
            does not need such a function.
        draw: The function that draws from a generator, if the operator takes none as an
            argument.
        move: The rule for the step by which a call advances the generator's offset.
        draws_nothing: Whether the operator draws nothing although it has torch's tag
            for drawing.
        composed: Takes an overload and returns the Python function that composes it of
            other operators, above autograd; None for an overload that needs none.
        decomposed: As ``composed``, but below autograd: for an operator that C++ composes
            on a card, and whose gradient autograd knows as a whole.
        formula: As ``composed``, but for autograd alone: below it, the operator runs as a
            whole.
        beside_meta: As ``composed``, but for calls with an operand on ``meta``.
        handler: Runs the operator instead of everything else; it takes the positional
            and the keyword arguments.
        around: Wraps the handler of an overload.
        check: Checks the devices of the operands; None means as declared by torch.
        helper: Takes the name of an argument and a host tensor, and returns whether C++ may
            have made the tensor itself: in a formula of forward AD, or in a rule of
            ``vmap``, it makes tensors on the device that it sees.
        takes_host: Whether host tensors may be mixed with a card's tensors.
        in_slices: Whether ``vmap`` runs the operator slice by slice (``batching.py``).
        has_cuda_kernel: Whether a card has a kernel for an operator that is composed on
            other devices.
        uses_cublas: Whether the kernel takes a cuBLAS handle, with its workspace.
        resizes: Whether the operator may resize an argument other than ``out=``.
        has_effects: Whether the operator changes arguments that its schema does not mark
            as written.
        lacks: Takes the arguments and returns the name of the kernel that has no variant
            for their dtypes; empty if the kernel has one.
        alert: The operator's name in the error that it has no deterministic
            implementation.
        alerts: Takes an overload and its arguments, positional and by name, and returns
            whether ``alert`` applies; None means always.
    """

    source: str
    defined_at: str
    requests: Callable[[Call], Iterable[RequestStep]] | None = None
    compute: Callable[[Any], Kernel | None] | None = None
    draw: Drawing | None = None
    move: Callable[[Call], int] | None = None
    draws_nothing: bool = False
    composed: Callable[[Any], Kernel | None] | None = None
    decomposed: Callable[[Any], Kernel | None] | None = None
    formula: Callable[[Any], Kernel | None] | None = None
    beside_meta: Callable[[Any], Kernel | None] | None = None
    handler: Handler | None = None
    around: Callable[[Any, Handler], Handler] | None = None
    check: Callable[[Any, list[Operand]], None] | None = None
    helper: Callable[[str, torch.Tensor], bool] | None = None
    takes_host: bool = False
    in_slices: bool = False
    has_cuda_kernel: bool = False
    uses_cublas: bool = False
    resizes: bool = False
    has_effects: bool = False
    lacks: Callable[[tuple[Any, ...]], str] | None = None
    alert: str = ""
    alerts: Callable[[Any, tuple[Any, ...], dict[str, Any]], bool] | None = None


#: Every record, by name.
OPERATORS: Final[dict[str, Operator]] = {}

#: The record of an operator that has no row.
PLAIN: Final = Operator(source="", defined_at="")


def register(names: str, *, source: str, **fields: Any) -> None:
    """Register one record for one or more operators.

    Args:
        names: Names in ``torch.ops.aten``, separated by blanks.
        source: The field ``source`` of ``Operator``.
        fields: The other fields of ``Operator``.

    Raises:
        ValueError: One of the operators already has a record.
    """
    frame = sys._getframe(1)
    defined_at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    operator = Operator(source=source, defined_at=defined_at, **fields)
    for name in names.split():
        other = OPERATORS.setdefault(name, operator)
        if other is not operator:
            raise ValueError(
                f"operator {name} has two rows: {other.defined_at} and {defined_at}; keep one"
            )


def find(func: Any) -> Operator:
    """Return the record of an overload of an operator."""
    if func.namespace != "aten":
        return PLAIN
    name = func.overloadpacket.__name__
    found = OPERATORS.get(name)
    if found is not None:
        return found
    out_of_place = name.removesuffix("_")
    if out_of_place in OPERATORS and not name.endswith("__"):
        # The in-place variant has the same record, except for the functions that run it.
        return replace(
            OPERATORS[out_of_place],
            compute=None,
            composed=None,
            decomposed=None,
            formula=None,
            beside_meta=None,
            handler=None,
            around=None,
        )
    for beginning, operator in OPERATORS.items():
        if beginning.endswith("*") and name.startswith(beginning[:-1]):
            return operator
    return PLAIN


def overloads() -> Iterator[tuple[str, Any, Operator]]:
    """Yield the name, overload and record of each registered overload of torch."""
    known = set(torch._C._dispatch_get_all_op_names())  # no public API
    for name, operator in OPERATORS.items():
        packet = getattr(torch.ops.aten, name, None)
        for overload in () if packet is None else packet.overloads():
            spelt = name if overload == "default" else f"{name}.{overload}"
            func = getattr(packet, overload)
            if func.name() in known:  # excludes TorchScript's overloads for lists
                yield spelt, func, operator
