"""Operators that take indices, gather and scatter."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.accumulation import numbering, taking_over
from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.kernel_types import (
    COMPLEX,
    INTEGERS,
    lacking,
    type_name,
    with_types,
)
from pytest_gpumem.devices.simulated.memory import Memory, hold
from pytest_gpumem.devices.simulated.operators.checks import (
    check_of,
    check_of_kernel,
    first_operand_only,
    iterated,
    iterated_on_first,
    refuse_devices,
)
from pytest_gpumem.devices.simulated.operators.composing import (
    checked,
    on_cpu_alone,
    on_host,
    only,
)
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Temporary,
    copy_of,
    is_number,
    packed,
)
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor
from pytest_gpumem.devices.simulated.torch_build import REFERENCES_BY_CPP
from pytest_gpumem.kernels.sort_memory import INDEX_BYTES, pairs_bytes, scan_bytes
from pytest_gpumem.stacks import LOCAL_USES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.operators.registry import Kernel
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep
    from pytest_gpumem.devices.simulated.tensor import Handler

_aten = torch.ops.aten
_HOST: Final = torch.device("cpu")
_META: Final = torch.device("meta")


def _indices(_func: Any, operands: list[Operand]) -> None:
    """Check the devices: indices on the host or the tensor's card, values on that card."""
    target = operands[0].device
    for each in operands[1:]:
        if each.name == "indices" and each.device not in (target, _HOST):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed "
                f"tensor ({target})"
            )


def _values(_func: Any, operands: list[Operand]) -> None:
    """Check the device of values; a single number is moved from any device."""
    target, values = operands[0].device, operands[-1]
    if values.device != target and values.tensor.dim() > 0:
        pair = (target, values.device)
        refuse_devices(*(pair if target.type == "cuda" else pair[::-1]))


def _moving_indices(func: Any, handler: Handler) -> Handler:
    """Return a handler that accepts indices on another device, and a target on the host.

    Source: ``make_info`` of ``TensorAdvancedIndexing.cpp``, which moves the indices, and
    ``_index_put_impl_`` there, which moves a single number.
    """

    def putting(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, indices, values, *rest = args
        device = target.device
        moved = [
            each
            if each is None or each.device in {device, _HOST, _META}
            else each.to(device)
            for each in indices
        ]
        if device == _HOST and values.is_cuda and not values.dim():
            values = values.to(device)
        args = (target, moved, values, *rest)
        is_on_host = device == values.device == _HOST
        return func(*args, **kwargs) if is_on_host else handler(args, kwargs)

    return taking_over(func, putting)


_CHECK = "TensorIndexing.h and TensorAdvancedIndexing.cpp, make_info"


def _putting(call: Call) -> Iterator[RequestStep]:
    """Request the memory to sum at sorted indices: ``index_put_with_sort_kernel``."""
    yield Results()
    source, values = call["self"], call["values"]
    indices = [each for each in call["indices"] if each is not None]
    if not call["accumulate"] or any(each.dtype is torch.bool for each in indices):
        return
    if not indices or not source.is_contiguous():
        return
    shape = torch.broadcast_shapes(*(each.shape for each in indices))
    count = math.prod(shape)
    if not count or not source.numel():
        return
    if not call.get("unsafe", False) and not in_backward():
        # The smallest and the largest index are compared with the bounds.
        for each in indices:
            yield from _checking_bounds(each.expand(shape))
    linear = None
    for _index in indices:
        wrapped = Temporary(count * INDEX_BYTES)
        scaled = Temporary(count * INDEX_BYTES)
        yield from (wrapped, scaled, Free(wrapped))
        if linear is None:
            linear = scaled
        else:
            yield Free(scaled)
    slices = source.numel() // math.prod(
        source.shape[dim]
        for dim, each in enumerate(call["indices"])
        if each is not None
    )
    if values.numel() < count * slices or not values.is_contiguous():
        yield Temporary(count * slices * source.itemsize)
    for _each in range(3):  # the sorted indices, their order, the original order
        yield Temporary(count * INDEX_BYTES)
    bits = max(source.numel() // max(slices, 1), 1).bit_length()
    yield Temporary(pairs_bytes(count, INDEX_BYTES, bits, call.processors))


def _checking_bounds(index: torch.Tensor) -> Iterator[RequestStep]:
    least, largest = Temporary(index.itemsize), Temporary(index.itemsize)
    yield from (least, largest)
    if not index.is_contiguous():
        copy = copy_of(index)
        yield from (copy, Free(copy))
    for _each in range(2):
        is_within = Temporary(1)
        yield from (is_within, Free(is_within))
    yield from (Free(least), Free(largest))


_PUT = "cuda/Indexing.cu, index_put_with_sort_kernel"


def _looking_up(call: Call) -> Iterator[RequestStep]:
    """Request copies of host indices, and of several indices with different strides."""
    indices = [each for each in call["indices"] if each is not None]
    for each in indices:
        if not hasattr(each.untyped_storage(), "_gpumem"):
            yield copy_of(each)
    if len(indices) > 1 and all(each.dtype in _NUMBERS for each in indices):
        shape = torch.broadcast_shapes(*(each.shape for each in indices))
        spread = [each.expand(shape) for each in indices]
        if len({each.stride() for each in spread}) > 1:
            for each in spread:
                if not each.is_contiguous():
                    yield copy_of(each, torch.int64)
    yield Results()


_NUMBERS: Final = frozenset({torch.int32, torch.int64})

#: References to an index that only C++ holds: by C++, the list of indices, and this code.
_INDEX_USES: Final = 1 + LOCAL_USES + REFERENCES_BY_CPP
#: The same while a checkpoint recomputes, because the tensors saved for backward refer to
#: it, too.
_RECOMPUTED_USES: Final = 2


def _lists_on_card(_func: Any, handler: Handler) -> Handler:
    """Return a handler that requests bytes for indices that C++ made from Python sequences.

    ``x[[0, 2]]`` makes them on the card, and backward keeps them. Here they were made
    on the host. Host tensors of the caller stay on the host.
    """

    def looking_up(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, indices = args[0], args[1]
        is_again = torch._C._current_graph_task_id() != -1
        uses = _INDEX_USES + (_RECOMPUTED_USES if is_again else 0)
        for each in indices:
            if (
                type(each) is torch.Tensor
                and type(source) is SimulatedTensor
                and sys.getrefcount(each) <= uses
                and not hasattr(each.untyped_storage(), "_gpumem")
            ):
                hold(each.untyped_storage(), Memory(source._gpumem_card, each.nbytes))
        return handler(args, kwargs)

    return looking_up


register(
    "index",
    check=_indices,
    requests=_looking_up,
    around=_lists_on_card,
    source=f"{_CHECK}; AdvancedIndex, all_strides_match; "
    "torch/csrc/autograd/python_variable_indexing.cpp, sequenceToVariable",
)
register(
    "_unsafe_index",
    check=_indices,
    requests=_looking_up,
    source=f"{_CHECK}; AdvancedIndex, all_strides_match",
)
register(
    "_unsafe_index_put",
    check=_values,
    requests=_putting,
    around=_moving_indices,
    source=f"{_CHECK}; {_PUT}",
)
register(
    "index_put index_put_ _index_put_impl_",
    check=_values,
    requests=_putting,
    around=_moving_indices,
    source=f"{_CHECK}; {_PUT}",
)


def _mask(func: Any, operands: list[Operand]) -> None:
    """Check the value's dimensions, then the mask, even if it has a single element."""
    target, mask = operands[0].device, operands[1].device
    count = operands[-1].tensor.dim() if len(operands) > 2 else 0  # noqa: PLR2004  # the third operand is the value
    if count:
        raise RuntimeError(
            "masked_fill_ only supports a 0-dimensional value tensor, but got tensor "
            f"with {count} dimension(s)."
        )
    if target.type == "cpu" and len(operands) > 2:  # noqa: PLR2004  # the third operand is the value
        raise RuntimeError("masked_fill_: Expected inputs to be on same device")
    if mask != target:
        raise RuntimeError(
            "expected self and mask to be on the same device, but got mask on "
            f"{mask} and self on {target}"
        )
    iterated(func, operands[:2])  # the value is read


register("masked_fill", check=_mask, source="cuda/IndexKernel.cpp, masked_fill__cuda")
register(
    "fill",
    check=lambda _func, _operands: None,  # a single number may be on any device
    source="Fill.cpp, fill_: value.item() where the devices differ",
)


def _reading_value(func: Any, handler: Handler) -> Handler:
    """Return a handler that reads a single number from another device than the target's."""

    def filling(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, dim, index, value = args
        is_elsewhere = (
            isinstance(value, torch.Tensor)
            and value.device != target.device
            and not value.is_meta
            and not value.dim()
        )
        if is_elsewhere:
            return func.overloadpacket(target, dim, index, value.item(), **kwargs)
        return handler(args, kwargs)

    return taking_over(func, filling)


# Torch 2.15 uses this operator to assign a number at host indices.
register(
    "index_fill_",
    around=_reading_value,
    takes_host=tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 15),
    source="TensorAdvancedIndexing.cpp, index_fill_",
)


def _split(
    _func: Any, _source: torch.Tensor, sections: torch.Tensor, *_rest: Any
) -> None:
    if not sections.is_cpu:
        raise RuntimeError(
            "tensor_split expected tensor_indices_or_sections to be on cpu, but it's on "
            f"{sections.device}"
        )
    if sections.dtype != torch.int64:
        raise RuntimeError(
            "tensor_split expected tensor_indices_or_sections to have dtype of long, but "
            f"got {type_name(sections.dtype)}"
        )


register(
    "tensor_split",
    composed=checked(_split, "tensor_indices_or_sections"),
    source="TensorShape.cpp, tensor_split",
)


def _along(
    _func: Any, source: torch.Tensor, indices: torch.Tensor, *_rest: Any
) -> None:
    if indices.device != source.device:
        raise RuntimeError(
            f"Expected tensor to have {source.device} Device, but got tensor with "
            f"{indices.device} Device (while checking arguments for "
            "torch.take_along_dim():)"
        )


register(
    "take_along_dim",
    composed=checked(_along, "default"),
    source="TensorAdvancedIndexing.cpp, _take_along_dim_helper",
)


def _unflattened(
    flat: torch.Tensor, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return views; for an empty tensor, a new one on the card, which C++ cannot make."""
    pieces, start = [], 0
    for each in tensors:
        piece = flat.narrow(0, start, each.numel())
        start += each.numel()
        pieces.append(piece.view(each.shape) if piece.numel() else piece.new_empty(0))
    return pieces


register(
    "unflatten_dense_tensors",
    composed=only(_unflattened),
    source="TensorShape.cpp, unflatten_dense_tensors",
)


def _block_diag(_func: Any, operands: list[Operand]) -> None:
    first = operands[0].device
    for index, each in enumerate(operands):
        if each.device != first:
            raise RuntimeError(
                "torch.block_diag: input tensors must all be on the same device. Input 0 "
                f"is on device {first} and input {index} is on device {each.device}"
            )


def _meshgrid(_func: Any, tensors: Sequence[torch.Tensor], *_rest: Any) -> None:
    for one, other in pairwise(tensors):
        if one.dtype != other.dtype:
            return  # C++ raises its own error first
        if one.device != other.device:
            raise RuntimeError("meshgrid expects all tensors to have the same device")


register("meshgrid", composed=checked(_meshgrid), source="TensorShape.cpp, meshgrid")
register("block_diag", check=_block_diag, source="TensorShape.cpp, block_diag")
# ``cat`` compares the devices of a stack.
register(
    "stack _stack", check=check_of("cat", ("tensors",)), source="TensorShape.cpp, stack"
)
register(
    "scatter_add",
    around=taking_over,
    source="TensorAdvancedIndexing.cpp, gather_backward",
)
register(
    "index_fill",
    around=_reading_value,
    check=iterated_on_first,
    source="FunctionsManual.cpp, value_selecting_reduction_backward and its like; "
    "TensorAdvancedIndexing.cpp, index_fill_",
)
register(
    "index_add",
    around=taking_over,
    source="FunctionsManual.cpp, value_selecting_reduction_backward and its like",
)


def _is_reduced_atomically(
    _func: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> bool:
    """Return whether the order of threads decides how ``scatter`` reduces tensors.

    Only sums of floating-point numbers have a deterministic implementation.
    """
    reduce = options.get("reduce")
    if reduce is None or not isinstance(args[3], torch.Tensor) or not args[2].numel():
        return False
    return bool(reduce != "add" or args[3].dtype in INTEGERS)


register(
    "scatter",
    around=taking_over,
    alert="scatter_reduce_cuda_kernel",
    alerts=_is_reduced_atomically,
    source="FunctionsManual.cpp, as above; what torch 2.13 says on the substitute runtime",
)
register(
    "put",
    around=taking_over,
    check=check_of_kernel("_put_", ("self", "index", "source")),
    alert="put_",
    alerts=lambda _func, args, _options: args[3:4] == (True,),
    source="FunctionsManual.cpp, as above; TensorAdvancedIndexing.cpp, put_",
)


def _multiplying(func: Any, handler: Handler) -> Handler:
    """Return a handler that refuses the dtypes that a card cannot multiply."""
    if not func._overloadname.endswith("reduce"):
        return handler
    kernel = (
        "cuda_scatter_fill_base_kernel_reduce_multiply"
        if func._overloadname == "value_reduce"
        else "cuda_scatter_gather_base_kernel_func"
    )
    typed = with_types(lacking(kernel, COMPLEX | {torch.bool}), handler)

    def scattering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chosen = typed if kwargs["reduce"] == "multiply" else handler
        return chosen(args, kwargs)

    return scattering


register(
    "scatter_",
    around=_multiplying,
    alert="scatter_reduce_cuda_kernel",
    alerts=_is_reduced_atomically,
    source="cuda/ScatterGatherKernel.cu, scatter_reduce_cuda_kernel and "
    "scatter_scalar_reduce_cuda_kernel",
)


register(
    "index_add_",
    around=numbering,
    source="FunctionsManual.cpp, as_strided_backward",
)


register(
    "combinations",
    composed=on_host,
    in_slices=True,
    source="Itertools.cpp: helpers by tensor.options()",
)


def _one_hot(func: Any) -> Kernel:
    """Run ``one_hot``; a kernel asserts that the classes are within bounds."""
    as_on_host = on_host(func)

    def kernel(classes: torch.Tensor, num_classes: int = -1) -> Any:
        if classes.dtype != torch.int64 or not classes.numel():
            return as_on_host(classes, num_classes)  # C++ checks these first
        if num_classes == -1:
            num_classes = int(classes.max().item()) + 1
        elif num_classes < 1:
            raise RuntimeError("num_classes should be positive")
        zeros = classes.new_zeros((*classes.shape, num_classes))
        return zeros.scatter_(-1, classes.unsqueeze(-1), 1)

    return kernel


register("one_hot", composed=_one_hot, in_slices=True, source="Onehot.cpp, one_hot")


def _narrow_copy(
    source: torch.Tensor, dim: int, start: int, length: int
) -> torch.Tensor:
    """Run ``narrow_copy``: a card copies a view; the CPU's kernel has other errors."""
    part = source.narrow(dim, start, length)
    return part.clone(memory_format=torch.contiguous_format)


register(
    "narrow_copy",
    compute=only(_narrow_copy),
    composed=lambda func: on_cpu_alone(func) if func._overloadname == "out" else None,
    source="native_functions.yaml, dispatch: of narrow_copy.out the CPU alone",
)


def _reduces(args: tuple[Any, ...]) -> str:
    kinds = set(args[4:5])
    lacks = (args[0].dtype is torch.bool and {"prod", "amin", "amax"} & kinds) or (
        args[0].is_complex() and kinds - {"sum"}
    )
    return "cuda_scatter_gather_base_kernel_func" if lacks else ""


def _counting_sources(call: Call) -> Iterator[RequestStep]:
    """Request the counts of the numbers at each index, which a mean needs."""
    yield Results()
    if call.get("reduce") != "mean":
        return
    result: Any = call.results[0]
    source = call["src"] if call.name == "scatter_reduce" else call["source"]
    ones, counts = copy_of(source), copy_of(result)
    if call.name == "scatter_reduce":
        yield from (ones, counts)
    else:
        yield from (counts, ones, Free(ones))
    yield copy_of(result, torch.bool)


register(
    "index_reduce",
    requests=_counting_sources,
    alert="index_reduce_cuda",
    source="cuda/Indexing.cu, TORCH_IMPL_FUNC(index_reduce_cuda_out)",
)
register(
    "scatter_reduce",
    requests=_counting_sources,
    lacks=_reduces,
    alert="scatter_reduce_cuda_prod_",
    alerts=lambda _func, args, _options: bool(args[4] == "prod" and args[2].numel()),
    source=(
        "cuda/ScatterGatherKernel.cu, cuda_scatter_gather_base_kernel; "
        "TensorAdvancedIndexing.cpp, scatter_reduce_two"
    ),
)


def _rolling(call: Call) -> Iterator[RequestStep]:
    """Request a buffer for each dimension that is rolled in turn: ``roll_common``."""
    source = call["self"]
    last = packed(source)
    yield last
    for _dim in range(len(call["dims"]) - 1):
        rolled = copy_of(source)
        yield rolled
        yield Free(last)
        last = rolled
    yield Results()


register(
    "roll",
    requests=_rolling,
    source="TensorTransformations.h, roll_common; cuda/TensorTransformations.cu, "
    "roll_cuda",
)


def _zero_first(call: Call) -> Iterator[RequestStep]:
    """Request a tensor on the card for the gradient's single zero."""
    if is_number(call["src"]):
        yield Temporary(call["src"].itemsize)


def _from_card(func: Any, handler: Handler) -> Handler:
    """Run an operator whose first operand may be on the host: the second one is copied."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        into, source, *rest = args
        if isinstance(into, SimulatedTensor):
            return handler(args, kwargs)
        return func(into, source.to(into.device), *rest, **kwargs)

    return run


register(
    "select_scatter",
    requests=_zero_first,
    check=first_operand_only,
    around=_from_card,
    source="derivatives.yaml, select_scatter: at::zeros_symint(src.sym_sizes()); "
    "TensorShape.cpp, select_scatter_symint",
)
# The second operand is copied from any device.
register(
    "as_strided_scatter diagonal_scatter slice_scatter",
    check=first_operand_only,
    around=_from_card,
    source="TensorShape.cpp, functions of these names",
)


def _gradient(func: Any) -> Kernel | None:
    """Compare the devices of distances and tensor, because C++ sees only the host."""
    if not func._overloadname.startswith("tensor"):
        return None

    def kernel(
        source: torch.Tensor, *, spacing: Sequence[torch.Tensor], **options: Any
    ) -> Any:
        for each in spacing:
            if each.device != source.device:
                raise RuntimeError(
                    "torch.gradient expected each tensor to be on the same device, but "
                    f"got devices {source.device} and {each.device}!"
                )
        return func.decompose(source, spacing=spacing, **options)

    return kernel


register("gradient", composed=_gradient, source="ReduceOps.cpp, pre_check_gradient")


def _repeating(call: Call) -> Iterator[RequestStep]:
    """Request the running sum of the repetition counts first."""
    repeats = call["repeats"]
    if repeats.numel():
        yield copy_of(repeats, torch.int64)
        count = repeats.numel()
        scan = Temporary(scan_bytes(count, INDEX_BYTES, is_plain=True))
        yield from (scan, Free(scan))
    yield Results()


register(
    "repeat_interleave",
    requests=lambda call: _repeating(call) if call.overload == "Tensor" else (),
    source="Repeat.cpp, repeat_interleave_common",
)

#: Bytes that one block of ``_chunk_cat`` copies.
_CHUNK_TILE = 2048


def _chunking(call: Call) -> Iterator[RequestStep]:
    """Request the sizes of all tensors and blocks, which are copied to the card at once.

    Tensors that are not contiguous are padded one at a time, and then joined.
    """
    tensors = call["tensors"]
    dim, chunks = call["dim"], call["num_chunks"]
    dim %= tensors[0].dim()
    itemsize = tensors[0].itemsize
    padded = []
    for each in tensors:
        lines = -(-each.shape[dim] // chunks) * chunks
        padded.append(each.numel() // max(each.shape[dim], 1) * lines * itemsize)
    if not all(each.is_contiguous() for each in tensors):
        yield from map(Temporary, padded)
        return
    yield Results()
    slices = chunks * math.prod(tensors[0].shape[:dim])
    blocks = sum(-(-nbytes // slices // _CHUNK_TILE) for nbytes in padded)
    count = 6 * len(tensors) + 2 + blocks
    yield Temporary(count * INDEX_BYTES)


register(
    "_chunk_cat",
    requests=_chunking,
    source="cuda/TensorShape.cu, get_chunk_cat_metadata; TensorShape.cpp, _pad_chunk",
)


def _bounded(
    source: torch.Tensor, indices: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    return [
        None if each is None else torch.clamp(each, -size, size - 1)
        for each, size in zip(indices, source.shape, strict=False)
    ]


def _unsafe_masked_index(
    source: torch.Tensor, mask: torch.Tensor, indices: Any, fill: float
) -> torch.Tensor:
    """Run ``_unsafe_masked_index``: indices are clamped, then masked values are filled."""
    if not source.numel():
        shape = torch.broadcast_shapes(
            *(each.shape for each in indices if each is not None)
        )
        return source.new_full(shape, fill)
    found: torch.Tensor = _aten._unsafe_index.Tensor(source, _bounded(source, indices))
    return found.masked_fill(mask.logical_not(), fill)


def _unsafe_masked_index_put(
    source: torch.Tensor, mask: torch.Tensor, indices: Any, values: torch.Tensor
) -> torch.Tensor:
    """Run ``_unsafe_masked_index_put_accumulate``.

    Indices are clamped to the bounds, then values are masked.
    """
    if not source.numel():
        return source.clone()
    bounded = _bounded(source, indices)
    wanted = values.masked_fill(mask.logical_not(), 0)
    result: torch.Tensor = _aten._unsafe_index_put.default(
        source, bounded, wanted, True
    )
    return result


register(
    "_unsafe_masked_index",
    decomposed=only(_unsafe_masked_index),
    source="TensorAdvancedIndexing.cpp, _unsafe_masked_index",
)
register(
    "_unsafe_masked_index_put_accumulate",
    decomposed=only(_unsafe_masked_index_put),
    source="TensorAdvancedIndexing.cpp, _unsafe_masked_index_put_accumulate",
)


def _scattering_by_mask(call: Call) -> Iterator[RequestStep]:
    """Request the running sum over the mask, which gives the source's index."""
    yield Results()
    result: Any = call.results[0]
    if not result.numel():
        return
    yield copy_of(result, torch.int64)
    if not call["mask"].expand(result.shape).is_contiguous():
        yield copy_of(result, torch.bool)
    yield Temporary(scan_bytes(result.numel(), INDEX_BYTES, is_plain=True))


register(
    "masked_scatter",
    requests=_scattering_by_mask,
    check=check_of_kernel("_masked_scatter_", ("self", "mask", "source")),
    source="cuda/IndexKernel.cpp, masked_scatter__cuda",
)
