"""Sums of gradients: autograd adds in place if nothing else refers to the first one.

C++ never does so for a tensor subclass, so a sum would take a block of its own here.
The values do go into a new tensor; the block is handed over.

Source: ``can_accumulate_inplace`` and ``accumulate`` of
``torch/csrc/autograd/input_buffer.cpp``, torch 2.13.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.memory import Memory, hold, memory_of
from pytest_gpumem.devices.simulated.operands import Operands
from pytest_gpumem.devices.simulated.operators.registry import find
from pytest_gpumem.devices.simulated.operators.requests import Call, ask
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make
from pytest_gpumem.devices.simulated.values import run

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.tensor import Handler

_add: Final[Any] = torch.ops.aten.add.Tensor
#: References to a gradient that only autograd's buffer has, seen from ``_may_reuse``:
#: the buffer, the dispatcher's stack and argument list, the Python object; and to its
#: storage: the tensor, the tensor with its values, the Python object.
_TENSOR_USES: Final = 4
_STORAGE_USES: Final = 3
_PYTHON_USES: Final = 5


def with_accumulation(func: Any, handler: Handler) -> Handler:
    """Return a handler that sums gradients in their own memory."""
    if func is not _add:
        return handler

    def adding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        if torch._C._current_graph_task_id() == -1 or kwargs:
            return handler(args, kwargs)
        if not _may_reuse(args) or _is_at_work(*_ADDING):
            return handler(args, kwargs)
        first, second = args
        summed = _add(first._gpumem_value, second._gpumem_value)
        storage = first._gpumem_value.untyped_storage()
        memory = memory_of(storage)
        if memory is None or summed.untyped_storage().nbytes() != memory.nbytes:
            return handler(args, kwargs)
        hold(summed.untyped_storage(), memory)
        del storage._gpumem  # the block has a new owner
        return make(summed, first._gpumem_card)

    return adding


def taking_over(func: Any, handler: Handler) -> Handler:
    """Return a handler whose result takes over the memory of its first operand.

    C++ that computes gradients makes a tensor and writes to it in place; where tensors
    are of a subclass it uses the operator that returns a new one. The first tensor has
    no other owner, so that its block is handed over.

    Source: the callers of ``areAnyTensorSubclassLike`` in
    ``torch/csrc/autograd/FunctionsManual.cpp`` and in ``aten/src/ATen/native``.
    """
    if func._schema.is_mutable:
        return handler

    def writing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        first = args[0]
        if torch._C._current_graph_task_id() == -1:
            return handler(args, kwargs)
        if type(first) is torch.Tensor and first.dim():
            return _into_zeros(func, args, kwargs)
        if not _is_new(first) or _is_at_work(*_KEEPING):
            return handler(args, kwargs)
        storage = first._gpumem_value.untyped_storage()
        memory = memory_of(storage)
        operands = Operands()
        values = [operands.unwrap(each) for each in args]
        card = first._gpumem_card
        written = run(func, values, kwargs, card, draw=None)
        if memory is None or written.untyped_storage().nbytes() != memory.nbytes:
            return handler(args, kwargs)
        hold(written.untyped_storage(), memory)
        del storage._gpumem  # the block has a new owner
        rule = find(func).requests
        if rule is not None:
            ask(rule(Call(func, values, kwargs, [written], card)), [0], card)
        return make(written, card)

    return writing


def _into_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write into zeros that C++ has made on the host, and makes on a card."""
    __tracebackhide__ = True
    operands = Operands()
    values = [operands.unwrap(each) for each in args]
    card = operands.card
    assert card is not None, "unreachable: dispatch needs a simulated operand"  # noqa: S101  # states why
    zeros = Memory(card, args[0].nbytes)
    others = [
        Memory(card, each.nbytes)
        for each in args[1:]
        if type(each) is torch.Tensor and each.dim()
    ]
    written = run(func, values, kwargs, card, draw=None)
    hold(written.untyped_storage(), zeros)
    del others
    return make(written, card)


def writing_losses(func: Any, handler: Handler) -> Handler:
    """Return ``taking_over`` for the gradients of a binary cross entropy alone.

    Source: ``binary_cross_entropy_target_backward`` and
    ``binary_cross_entropy_with_logits_backward`` of
    ``torch/csrc/autograd/FunctionsManual.cpp``.
    """
    taken = taking_over(func, handler)
    if taken is handler:
        return handler
    is_product = func.overloadpacket is torch.ops.aten.mul
    node = "BinaryCrossEntropy" if is_product else "BinaryCrossEntropyWith"

    def writing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        is_kept = hasattr(args[0], "_gpumem_kept")
        chosen = taken if not is_kept and _is_at_work(node) else handler
        return chosen(args, kwargs)

    return writing


def keeping(func: Any, handler: Handler) -> Handler:
    """Return a handler whose result C++ does not write to, if only losses would.

    Source: ``binary_cross_entropy_with_logits_target_backward``.
    """
    if func._schema.is_mutable:
        return handler

    def kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        made = handler(args, kwargs)
        if _is_at_work("BinaryCrossEntropyWith"):
            made._gpumem_kept = True
        return made

    return kept


def numbering(func: Any, handler: Handler) -> Handler:
    """Return a handler of a sum over places that overlap, which C++ has numbered.

    The numbers, and those of a view's places, are tensors of the card.

    Source: ``as_strided_backward`` of ``torch/csrc/autograd/FunctionsManual.cpp``.
    """
    if not func._schema.is_mutable:
        return handler

    def summing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        places = args[2]
        if type(places) is not torch.Tensor or not _is_at_work("AsStrided"):
            return handler(args, kwargs)
        target = args[0]
        numbers = Memory(target._gpumem_card, target.numel() * places.itemsize)
        copy = Memory(target._gpumem_card, places.nbytes)
        try:
            return handler(args, kwargs)
        finally:
            del copy, numbers

    return summing


def _is_at_work(*names: str) -> bool:
    """Tell whether a node of autograd runs whose name begins with a text."""
    if torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()  # it has no public name
    return node is not None and node.name().startswith(names)


#: Nodes whose C++ adds by itself, into new memory, by name.
#: Source: ``lu_unpack_backward``, ``i1_backward`` and ``i1e_backward``.
_ADDING: Final = ("LuUnpack", "SpecialI1")
#: Nodes whose C++ keeps the first operand, by name.
#: Source: ``scatter_reduce_backward`` and ``index_reduce_backward``.
_KEEPING: Final = ("ScatterReduceBackward", "IndexReduceBackward")


def _is_new(tensor: Any) -> bool:
    """Tell whether only the C++ that calls an operator refers to its first operand."""
    is_ours = type(tensor) is SimulatedTensor
    return (
        is_ours
        and tensor._use_count() <= _TENSOR_USES + 1  # an optional of C++
        and sys.getrefcount(tensor) <= _PYTHON_USES
        and _storage_uses(tensor) <= _STORAGE_USES
    )


def _may_reuse(args: tuple[Any, ...]) -> bool:
    """Tell whether only autograd's buffer refers to the first of two gradients."""
    first, second = args
    if type(first) is not SimulatedTensor or type(second) is not SimulatedTensor:
        return False
    uses: Any = first
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and uses._use_count() <= _TENSOR_USES
        and sys.getrefcount(first) <= _PYTHON_USES
        and _storage_uses(first) <= _STORAGE_USES
        and bool(
            torch.ops.aten.is_non_overlapping_and_dense.default(first._gpumem_value)
        )
    )


def _storage_uses(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    count: int = torch._C._storage_Use_Count(storage._cdata)  # how torch counts
    return count
