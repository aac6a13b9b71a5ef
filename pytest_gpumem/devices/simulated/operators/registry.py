"""One record for each operator: all that the simulated card needs to know about it.

An operator that needs nothing has none: it runs on the CPU's tensors and its results
are charged in their order. What torch declares itself, as which operands are compared,
what autocast does and what draws, is read from its own files and tags. Whatever else an
operator needs is one row in the module of its family::

    register("cumsum", alert="cumsum_cuda_kernel", source="ScanKernels.cpp")

A row speaks of an operator by its name in ``torch.ops.aten``, all overloads together,
and of its variant in place (``add`` is ``add`` and ``add_``) unless that has a row of
its own. ``_foreach_*`` is a row for what has none of that beginning. A name in two rows
is an error of the import. A name that the installed torch does not have is passed over.
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
        source: Where it stands, in PyTorch's sources: file and function, or the field
            of ``native_functions.yaml``.
        place: The module and line of the row.
        requests: What it asks of the allocator, in order; None: its results alone.
            See ``requests.py``.
        compute: Returns how the CPU computes the values of an overload, where the CPU's
            own kernel does not know what a card's does: a function called as the
            overload is; None for an overload of which that is not so.
        draw: How it draws from a generator, where it takes none as an argument.
        move: By how much a call moves a generator's offset, beside what it draws.
        draws_nothing: Whether torch's tag that it draws is wrong.
        composed: Returns the Python function that composes an overload of other
            operators, above autograd; None for an overload that needs none.
        decomposed: The same below autograd: for what C++ composes of others on a card,
            while autograd knows its gradient as a whole.
        handler: Runs it instead of everything else, given arguments and keywords.
        around: Wraps the handler of an overload.
        check: Holds operands to devices; None: as its declaration says.
        takes_host: Whether tensors of the host may stand beside a card's.
        has_cuda_kernel: Whether a card has a kernel for what is composed elsewhere.
        uses_cublas: Whether the kernel takes a cuBLAS handle, with its workspace.
        resizes: Whether it may give an argument another size that is no ``out=``.
        has_effects: Whether it changes what its schema does not say.
        lacks: Names the kernel that has no variant for the types of some arguments;
            empty where it has one.
        alert: What it calls itself where it has no deterministic way to run.
        alerts: Whether that holds of an overload and its arguments; None: of all.
    """

    source: str
    place: str
    requests: Callable[[Call], Iterable[RequestStep]] | None = None
    compute: Callable[[Any], Kernel | None] | None = None
    draw: Drawing | None = None
    move: Callable[[Call], int] | None = None
    draws_nothing: bool = False
    composed: Callable[[Any], Kernel | None] | None = None
    decomposed: Callable[[Any], Kernel | None] | None = None
    handler: Handler | None = None
    around: Callable[[Any, Handler], Handler] | None = None
    check: Callable[[Any, list[Operand]], None] | None = None
    takes_host: bool = False
    has_cuda_kernel: bool = False
    uses_cublas: bool = False
    resizes: bool = False
    has_effects: bool = False
    lacks: Callable[[tuple[Any, ...]], str] | None = None
    alert: str = ""
    alerts: Callable[[Any, tuple[Any, ...]], bool] | None = None


#: Every record, by name.
OPERATORS: Final[dict[str, Operator]] = {}

#: What an operator needs that has no record.
PLAIN: Final = Operator(source="", place="")


def register(names: str, *, source: str, **fields: Any) -> None:
    """Register the record of operators.

    Args:
        names: Their names in ``torch.ops.aten``, between blanks.
        source: The place in PyTorch's sources.
        fields: The other fields of ``Operator``.

    Raises:
        ValueError: One of them has a record already.
    """
    frame = sys._getframe(1)
    place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    operator = Operator(source=source, place=place, **fields)
    for name in names.split():
        other = OPERATORS.setdefault(name, operator)
        if other is not operator:
            raise ValueError(
                f"operator {name} has two rows: {other.place} and {place}; keep one"
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
        # What is done in place is no other thing, but what runs it is.
        return replace(
            OPERATORS[out_of_place],
            compute=None,
            composed=None,
            decomposed=None,
            handler=None,
            around=None,
        )
    for beginning, operator in OPERATORS.items():
        if beginning.endswith("*") and name.startswith(beginning[:-1]):
            return operator
    return PLAIN


def overloads() -> Iterator[tuple[str, Any, Operator]]:
    """Yield each overload of the installed torch that a record names, by name."""
    known = set(torch._C._dispatch_get_all_op_names())  # it has no public name
    for name, operator in OPERATORS.items():
        packet = getattr(torch.ops.aten, name, None)
        for overload in () if packet is None else packet.overloads():
            spelt = name if overload == "default" else f"{name}.{overload}"
            func = getattr(packet, overload)
            if func.name() in known:  # TorchScript's own, of lists, are not
                yield spelt, func, operator
