"""Sums gradients in place if autograd holds the only reference to the first one.

C++ never adds in place for a subclass of Tensor, so a sum would take a new block. Here
the values of a sum are in a new tensor, and the block of the first gradient is passed on
to it.

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
from pytest_gpumem.devices.simulated.torch_build import REFERENCES_BY_CPP
from pytest_gpumem.devices.simulated.values import run
from pytest_gpumem.stacks import LOCAL_USES

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.tensor import Handler

_add: Final[Any] = torch.ops.aten.add.Tensor
#: The number of references, inside ``_may_reuse``, to a gradient that is only in autograd's
#: buffer: the buffer, the dispatcher's stack, its argument list, and the Python object. The
#: storage is referred to by the tensor, the tensor with the values, and its Python object.
#: The Python object is referred to by the operator's arguments, two local variables, and
#: C++.
_TENSOR_USES: Final = 4
_STORAGE_USES: Final = 3
_PYTHON_USES: Final = 2 + LOCAL_USES + REFERENCES_BY_CPP
#: The references to the Python object inside ``_is_new``, which gets it as an argument. In
#: each torch version, C++ creates a new object for the call.
_NEW_PYTHON_USES: Final = 1 + 2 * LOCAL_USES


def with_accumulation(func: Any, handler: Handler) -> Handler:
    """Return a handler that sums gradients in the memory of the first one."""
    if func is not _add:
        return handler

    def adding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._current_graph_task_id() == -1 or kwargs:
            return handler(args, kwargs)
        if not _may_reuse(args) or _is_at_work(*_ADDING):
            return handler(args, kwargs)
        first, second = args
        values = first._gpumem_value, second._gpumem_value
        summed = run(func, values, {}, first._gpumem_card, draw=None)
        storage = first._gpumem_value.untyped_storage()
        memory = memory_of(storage)
        if memory is None or summed.untyped_storage().nbytes() != memory.nbytes:
            return handler(args, kwargs)
        hold(summed.untyped_storage(), memory)
        del storage._gpumem  # the new storage owns the block
        return make(summed, first._gpumem_card)

    return adding


def taking_over(func: Any, handler: Handler) -> Handler:
    """Return a handler whose result takes over the memory of its first operand.

    C++ code for gradients often creates a tensor and writes to it in place. For a subclass
    of Tensor, it calls the operator that returns a new tensor instead. The first operand
    then has no other reference, and its block is passed on to the result.

    Source: the callers of ``areAnyTensorSubclassLike`` in
    ``torch/csrc/autograd/FunctionsManual.cpp`` and in ``aten/src/ATen/native``.
    """
    if func._schema.is_mutable:
        return handler
    is_logical = func.overloadpacket is torch.ops.aten.logical_or
    keeping_first = (*_KEEPING, *_NORMS) if is_logical else _KEEPING

    def writing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = args[0]
        if torch._C._current_graph_task_id() == -1:
            return handler(args, kwargs)
        if type(first) is torch.Tensor and first.dim():
            return _into_zeros(func, args, kwargs)
        if not _is_new(first) or _is_at_work(*keeping_first):
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
        del storage._gpumem  # the new storage owns the block
        rule = find(func).requests
        if rule is not None:
            ask(rule(Call(func, values, kwargs, [written], card)), [0], card)
        return make(written, card)

    return writing


def _into_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write to zeros on a card in place of those that C++ created on the host."""
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
    """Return the handler of ``taking_over``, only for binary cross entropy gradients.

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
        is_kept = hasattr(args[0], "_gpumem_kept")
        chosen = taken if not is_kept and _is_at_work(node) else handler
        return chosen(args, kwargs)

    return writing


def keeping(func: Any, handler: Handler) -> Handler:
    """Return a handler that marks results to which losses do not write in place.

    Source: ``binary_cross_entropy_with_logits_target_backward``.
    """
    if func._schema.is_mutable:
        return handler

    def kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = handler(args, kwargs)
        if _is_at_work("BinaryCrossEntropyWith"):
            made._gpumem_kept = True
        return made

    return kept


#: The accumulation types that C++ takes for the host, and a card's in place of them.
#: Source: ``toAccumulateType`` of ``aten/src/ATen/AccumulateType.cpp``.
_ACCUMULATED: Final = {
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}


def accumulating(_func: Any, handler: Handler) -> Handler:
    """Return a handler of a sum to which C++ passes the host's accumulation type.

    Source: ``renorm_backward`` of ``torch/csrc/autograd/FunctionsManual.cpp``.
    """

    def summing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted: Any = kwargs.get("dtype")
        is_wider = wanted in _ACCUMULATED and args[0].dtype not in _ACCUMULATED
        if is_wider and _is_at_work("Renorm"):
            kwargs = {**kwargs, "dtype": _ACCUMULATED[wanted]}
        return handler(args, kwargs)

    return summing


def numbering(func: Any, handler: Handler) -> Handler:
    """Return a handler of a sum over overlapping elements, for which C++ makes indices.

    These indices, and those of a view's elements, are tensors on the card.

    Source: ``as_strided_backward`` of ``torch/csrc/autograd/FunctionsManual.cpp``.
    """
    if not func._schema.is_mutable:
        return handler

    def summing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
    """Return whether the name of the running autograd node begins with a prefix."""
    if torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()  # no public API
    return node is not None and node.name().startswith(names)


#: Prefixes of nodes whose C++ code adds into new memory.
#: Source: ``lu_unpack_backward``, ``i1_backward`` and ``i1e_backward``.
_ADDING: Final = ("LuUnpack", "SpecialI1")
#: Prefixes of nodes whose C++ code keeps the first operand.
#: Source: ``scatter_reduce_backward`` and ``index_reduce_backward``.
_KEEPING: Final = ("ScatterReduceBackward", "IndexReduceBackward")
#: Prefixes of nodes whose C++ code keeps the first operand of ``logical_or``.
#: Source: ``linalg_vector_norm_backward``.
_NORMS: Final = ("LinalgVectorNorm", "Renorm")


def _is_new(tensor: Any) -> bool:
    """Return whether only the C++ caller of an operator refers to a tensor."""
    is_ours = type(tensor) is SimulatedTensor
    return (
        is_ours
        and tensor._use_count()
        <= _TENSOR_USES + 1  # one more reference by std::optional
        and sys.getrefcount(tensor) <= _NEW_PYTHON_USES
        and _storage_uses(tensor) <= _STORAGE_USES
    )


def _may_reuse(args: tuple[Any, ...]) -> bool:
    """Return whether only autograd's buffer refers to the first of two gradients."""
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
    count: int = torch._C._storage_Use_Count(storage._cdata)  # torch's own count
    return count
