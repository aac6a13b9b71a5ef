"""Runs each operator of ``torch.ops.c10d`` in an NCCL group on simulated cards.

Sources, unless a function names another: the method of the same name in
``torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp``, and ``Ops.cpp`` for the arguments and
results of an operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from pytest_gpumem.devices.simulated.distributed.backend import (
    NcclBackend,
    backend_of,
    current_reduction,
)
from pytest_gpumem.devices.simulated.distributed.works import nccl_error
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.memory import Memory
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pytest_gpumem.devices.simulated.card import SimulatedCard
    from pytest_gpumem.devices.simulated.tensor import Handler

_Kind: Final[Any] = dist.ReduceOp.RedOpType
_MULTI_DEVICE: Final = (
    "Expecting one tensor only but got multiple. You are probably using multiple "
    "devices under one thread. The support for such usage has been deprecated. For "
    "details, please refer to "
    "https://pytorch.org/docs/stable/distributed.html#multi-gpu-collective-functions. "
    "ProcessGroupNCCL continues supporting multi-process and multi-thread modes."
)
#: Dtypes that NCCL supports. Source: ``ncclDataType`` of ``ProcessGroupNCCL.cpp``.
_TYPES: Final = {
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.float8_e5m2: "Float8_e5m2",
}
_FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
_NAMES: Final = {
    torch.int16: "Short",
    torch.uint16: "UInt16",
    torch.uint32: "UInt32",
    torch.uint64: "UInt64",
}
#: Bitwise reductions, which NCCL does not support.
_BITWISE: Final = {_Kind.BAND: "BAND", _Kind.BOR: "BOR", _Kind.BXOR: "BXOR"}


class Carried(NamedTuple):
    """Values that are being sent.

    Attributes:
        works: The works of gloo that send the values.
        finish: The function that this rank calls when the values have arrived.
    """

    works: Sequence[dist.Work]
    finish: Callable[[], None] | None = None


class CollectiveCall:
    """One collective: its name, the group and the operator's arguments."""

    def __init__(
        self, name: str, group: Any, backend: NcclBackend, given: dict[str, Any]
    ) -> None:
        self.name = name
        self.group = group
        self.backend = backend
        self.given = given
        self.timeout = backend.timeout_of(given.get("timeout", -1))
        self.card: SimulatedCard | None = None
        #: Memory that is held on the card until the collective is complete.
        self.held: list[Memory] = []

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    @property
    def size(self) -> int:
        """The number of ranks."""
        size: int = self.backend.size()
        return size

    @property
    def rank(self) -> int:
        """This process's rank."""
        rank: int = self.backend.rank()
        return rank

    # -- checks -------------------------------------------------------------------------

    def values(
        self, tensors: Sequence[torch.Tensor], *, is_message: bool = False
    ) -> list[torch.Tensor]:
        """Return the values of tensors for NCCL; complex numbers as pairs.

        Source: ``check_gpu_single_tensor`` and ``getNCCLComm``.

        Raises:
            ValueError: A tensor is on the host, is sparse or has gaps.
            torch.distributed.DistBackendError: A tensor is on a card other than the group's.
        """
        return [self._value(each, is_message=is_message) for each in tensors]

    def _value(self, tensor: torch.Tensor, *, is_message: bool) -> torch.Tensor:
        if not isinstance(tensor, SimulatedTensor):
            raise ValueError("Tensors must be CUDA and dense")  # noqa: TRY004  # as torch
        value = tensor._gpumem_value
        if not is_message and not _is_contiguous(value):
            raise ValueError("Tensors must be contiguous")
        self._use(tensor._gpumem_card)
        return torch.view_as_real(value) if value.is_complex() else value

    def _use(self, card: SimulatedCard) -> None:
        if self.card is None:
            bound = getattr(self.group, "bound_device_id", None)
            if bound is not None and bound.index != card.index:
                raise self.backend.wrong_card(bound, card)
            self.card = card
        elif self.card is not card:
            raise ValueError("Expected list of tensors on the same device")

    def one(self, name: str, *, is_message: bool = False) -> torch.Tensor:
        """Return the value of the only tensor in a list."""
        tensors = self[name]
        if len(tensors) != 1:
            raise RuntimeError(_MULTI_DEVICE)
        return self.values(tensors, is_message=is_message)[0]

    def root(self) -> int:
        """Return the rank that a collective begins or ends at.

        Source: ``gather`` and ``scatter`` of ``ProcessGroupNCCL.cpp``, which make their
            own check, and ``ArgsCheck`` of NCCL's ``argcheck.cc`` for the others.

        Raises:
            ValueError: The group has no such rank, in a gather or scatter.
            torch.distributed.DistBackendError: The same, in another collective.
        """
        root: int = self["root_rank"] + self.given.get("root_tensor", 0)
        if 0 <= root < self.size:
            return root
        if self.name in {"gather", "scatter"}:
            raise ValueError(
                f"ProcessGroupNCCL::{self.name}: invalid root rank: {root}"
            )
        raise nccl_error(
            "invalid argument (run with NCCL_DEBUG=WARN for details)",
            "ncclInvalidArgument: Invalid value for an argument.",
            f"{self.name.capitalize()} : invalid root {root} (root should be in the "
            f"0..{self.size} range)",
        )

    def hold(self, nbytes: int) -> None:
        """Hold bytes on the card until the collective is complete."""
        assert self.card is not None, "unreachable: a tensor is on it"  # noqa: S101  # states why
        self.held.append(Memory(self.card, nbytes))

    # -- the work -----------------------------------------------------------------------

    def start(
        self,
        what: str,
        carry: Callable[[], Carried],
        *,
        outputs: Sequence[torch.Tensor],
        counts: tuple[int, int],
        is_message: bool = False,
    ) -> Any:
        """Start to send the values, and return the work as an operator does."""
        card = self.card
        has_values = card is None or card.value_device != "meta"
        if card is not None and not is_message:
            self.backend.connect(card)
        explain = None
        if has_values and not is_message and self.size > 1:
            explain = self.backend.agree(_fingerprint(what, outputs, counts))
        with torch.no_grad():
            carried = carry() if has_values else Carried(())
        is_async = self.given.get("async_op", True) and not is_message
        kept = [*self._tensors(), *outputs, *self.held] if is_async else ()
        work = self.backend.start(
            what,
            stashed=kept,
            timeout=self.timeout,
            inner=carried.works,
            finish=carried.finish,
            outputs=outputs,
            counts=counts,
            held=self.held,
            explain=explain,
        )
        return work.boxed()

    def _tensors(self) -> list[torch.Tensor]:
        """Return the tensors among the operator's arguments."""
        found: list[torch.Tensor] = []
        waiting = list(self.given.values())
        while waiting:
            each = waiting.pop()
            if isinstance(each, torch.Tensor):
                found.append(each)
            elif isinstance(each, (list, tuple)):
                waiting.extend(each)
        return found

    def options(self, made: Any, **fields: Any) -> Any:
        """Fill in gloo's options."""
        made.timeout = self.timeout
        for name, value in fields.items():
            setattr(made, name, value)
        return made


#: Collectives whose sizes are the same on all ranks; in others the sizes may differ.
_EVEN: Final = frozenset(
    {
        "ALLREDUCE",
        "BROADCAST",
        "COALESCED",
        "REDUCE",
        "_ALLGATHER_BASE",
        "_REDUCE_SCATTER_BASE",
    }
)


def _fingerprint(
    what: str, outputs: Sequence[torch.Tensor], counts: tuple[int, int]
) -> str:
    """Return the facts about a collective that must be the same on all ranks."""
    if what not in _EVEN or not outputs:
        return f"OpType={what}"
    kinds = ", ".join(sorted({str(each.dtype) for each in outputs}))
    return f"OpType={what}, NumelIn={counts[0]}, NumelOut={counts[1]}, Dtypes={kinds}"


def _is_contiguous(value: torch.Tensor) -> bool:
    """Return whether a tensor is dense in its memory format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(value.dim())
    return value.is_contiguous() or (
        last is not None and value.is_contiguous(memory_format=last)
    )


def _check_type(dtype: torch.dtype) -> None:
    """Raise an error if NCCL does not support a dtype.

    Raises:
        RuntimeError: NCCL does not support the dtype.
    """
    if dtype not in _TYPES:
        name = _NAMES.get(dtype, str(dtype).removeprefix("torch."))
        raise RuntimeError(f"Unconvertible NCCL type {name}")


def _flat(value: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor as bytes, in memory order."""
    _check_type(value.dtype)
    line = value.as_strided((value.numel(),), (1,), value.storage_offset())
    return line.view(torch.uint8)


# -- reductions -----------------------------------------------------------------------------


def _check_reduction(kind: Any, value: torch.Tensor) -> None:
    """Raise an error if NCCL does not support a reduction.

    Source: ``getNcclReduceOp``.

    Raises:
        TypeError: The reduction is the mean of booleans.
        ValueError: NCCL does not support the operation.
        RuntimeError: NCCL does not support the dtype, or cannot reduce it.
    """
    if value.dtype in _FLOAT8:
        raise RuntimeError(
            "Float8 dtypes are not currenlty supported for NCCL reductions"
        )
    _check_type(value.dtype)
    if kind in _BITWISE:
        raise ValueError(f"Cannot use ReduceOp.{_BITWISE[kind]} with NCCL")
    if kind == _Kind.AVG and value.dtype is torch.bool:
        raise TypeError("Cannot use ReduceOp.AVG with Boolean inputs")


class _Reduction:
    """How one collective reduces: the input to gloo, and the use of gloo's result.

    NCCL multiplies before it adds: a mean is a sum of scaled numbers, except for integers.
    Source: ``hostToDevRedOp`` of NCCL's ``enqueue.cc``.
    """

    def __init__(self, call: CollectiveCall, value: torch.Tensor) -> None:
        kind, factor = current_reduction()
        _check_reduction(kind, value)
        self._is_mean_of_ints = kind == _Kind.AVG and not value.is_floating_point()
        self._size = call.size
        self._factor: Any = None
        if kind == _Kind.PREMUL_SUM:
            self._factor = getattr(factor, "_gpumem_value", factor)
        elif kind == _Kind.AVG and not self._is_mean_of_ints:
            self._factor = 1 / call.size
        self.operation: Any = dist.ReduceOp.SUM
        if kind in (_Kind.MIN, _Kind.MAX, _Kind.PRODUCT):
            self.operation = dist.ReduceOp(kind)
        if value.dtype is torch.bool:
            # NCCL treats booleans as bytes: their sum is the maximum, their product the minimum.
            few = kind in (_Kind.MIN, _Kind.PRODUCT)
            self.operation = dist.ReduceOp.MIN if few else dist.ReduceOp.MAX

    def scratch(self, value: torch.Tensor) -> torch.Tensor:
        """Return a host tensor that gloo may reduce in place."""
        line = value.as_strided((value.numel(),), (1,), value.storage_offset())
        if line.dtype is torch.bool:
            line = line.view(torch.uint8)
        if self._factor is None:
            return line.clone()
        factor = self._factor
        if isinstance(factor, torch.Tensor):
            factor = factor.to(line.dtype)
        scaled: torch.Tensor = line * factor
        return scaled

    def write(self, reduced: torch.Tensor, value: torch.Tensor) -> None:
        """Write the reduced values to the tensor of the result."""
        if self._is_mean_of_ints:
            reduced = torch.div(reduced, self._size, rounding_mode="trunc")
        line = value.as_strided((value.numel(),), (1,), value.storage_offset())
        line.copy_(reduced)


def _all_reduced(call: CollectiveCall, value: torch.Tensor) -> Carried:
    """Reduce a tensor over all ranks, with the result on every rank."""
    reduction = _Reduction(call, value)
    if value.is_meta:
        return Carried(())
    scratch = reduction.scratch(value)
    options = call.options(c10d.AllreduceOptions(), reduceOp=reduction.operation)
    work = call.backend.transport("allreduce", [scratch], options)
    return Carried([work], lambda: reduction.write(scratch, value))


def _together(started: Sequence[Carried]) -> Carried:
    """Combine several collectives into one."""

    def finish() -> None:
        for each in started:
            if each.finish is not None:
                each.finish()

    return Carried([work for each in started for work in each.works], finish)


def all_reduce(call: CollectiveCall) -> Any:
    """Run ``all_reduce``."""
    value = call.one("tensors")
    return call["tensors"], _reduce_each(call, "ALLREDUCE", [value])


def all_reduce_coalesced(call: CollectiveCall) -> Any:
    """Run ``all_reduce`` of several tensors together."""
    values = call.values(call["tensors"])
    if len({each.dtype for each in values}) > 1:
        raise TypeError("Tensors must have identical type")
    return _reduce_each(call, "COALESCED", values)


def _reduce_each(call: CollectiveCall, what: str, values: list[torch.Tensor]) -> Any:
    for each in values:
        _check_reduction(current_reduction()[0], each)

    def carry() -> Carried:
        return _together([_all_reduced(call, each) for each in values])

    count = sum(each.numel() for each in values)
    return call.start(
        what,
        carry,
        outputs=call["tensors"],
        counts=(count, count),
    )


def reduce(call: CollectiveCall) -> Any:
    """Run ``reduce``: the tensors of the other ranks do not change."""
    value = call.one("tensors")
    root = call.root()
    reduction = _Reduction(call, value)
    scratch = value if value.is_meta else reduction.scratch(value)
    options = call.options(
        c10d.ReduceOptions(), reduceOp=reduction.operation, rootRank=root
    )

    def finish() -> None:
        if call.rank == root:
            reduction.write(scratch, value)

    return call.start(
        "REDUCE",
        lambda: Carried([call.backend.transport("reduce", [scratch], options)], finish),
        outputs=call["tensors"],
        counts=(value.numel(), value.numel()),
    )


def _scattered(
    call: CollectiveCall, parts: Sequence[torch.Tensor], output: torch.Tensor
) -> Carried:
    """Reduce one part of each rank's tensor to the rank that receives this part."""
    reduction = _Reduction(call, output)
    works, scratches = [], []
    for rank, part in enumerate(parts):
        scratch = reduction.scratch(part)
        options = call.options(
            c10d.ReduceOptions(), reduceOp=reduction.operation, rootRank=rank
        )
        works.append(call.backend.transport("reduce", [scratch], options))
        scratches.append(scratch)
    return Carried(works, lambda: reduction.write(scratches[call.rank], output))


def reduce_scatter(call: CollectiveCall) -> Any:
    """Run ``reduce_scatter`` of a list, through one tensor if all sizes are equal."""
    output = call.one("output_tensors")
    inputs = call.values(call["input_tensors"][0])
    if _are_equal(inputs):
        call.hold(sum(each.nbytes for each in inputs))
    work = _scatter_each(
        call, "REDUCE_SCATTER", [(inputs, output)], call["output_tensors"]
    )
    return call["output_tensors"], work


def reduce_scatter_tensor(call: CollectiveCall) -> Any:
    """Run ``reduce_scatter_tensor``."""
    output, source = call["output_tensor"], call["input_tensor"]
    pair = _parts_for(call, output, source)
    work = _scatter_each(call, "_REDUCE_SCATTER_BASE", [pair], [output])
    return output, work


def reduce_scatter_tensor_coalesced(call: CollectiveCall) -> Any:
    """Run ``reduce_scatter_tensor`` of several tensors together."""
    pairs = [
        _parts_for(call, output, source)
        for output, source in zip(call["outputs"], call["inputs"], strict=True)
    ]
    return _scatter_each(call, "COALESCED", pairs, call["outputs"])


def _parts_for(
    call: CollectiveCall, output: torch.Tensor, source: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return each rank's part of a tensor to scatter, and the target of this rank's part."""
    if source.dtype != output.dtype:
        raise TypeError("input tensor must be the same type as the output tensor.")
    if source.numel() != output.numel() * call.size:
        raise ValueError(
            "input tensor must be the same size as output size times world size"
        )
    target, value = call.values([output, source])
    line = value.as_strided((value.numel(),), (1,), value.storage_offset())
    return list(line.view(call.size, -1).unbind()), target


def _scatter_each(
    call: CollectiveCall,
    what: str,
    pairs: list[tuple[list[torch.Tensor], torch.Tensor]],
    outputs: Sequence[torch.Tensor],
) -> Any:
    for _parts, output in pairs:
        _check_reduction(current_reduction()[0], output)

    def carry() -> Carried:
        return _together([_scattered(call, *each) for each in pairs])

    count = sum(output.numel() for _parts, output in pairs)
    return call.start(
        what,
        carry,
        outputs=outputs,
        counts=(count * call.size, count),
    )


# -- moving values --------------------------------------------------------------------------


def broadcast(call: CollectiveCall) -> Any:
    """Run ``broadcast``."""
    value = call.one("tensors")
    root = call.root()
    options = call.options(c10d.BroadcastOptions(), rootRank=root)
    work = call.start(
        "BROADCAST",
        lambda: Carried([call.backend.transport("broadcast", [_flat(value)], options)]),
        outputs=call["tensors"],
        counts=(value.numel(), value.numel()),
    )
    return call["tensors"], work


def _are_equal(values: Sequence[torch.Tensor]) -> bool:
    return all(each.shape == values[0].shape for each in values)


def all_gather(call: CollectiveCall) -> Any:
    """Run ``all_gather`` to a list, through one tensor if all sizes are equal."""
    source = call.one("input_tensors")
    outputs = call["output_tensors"][0]
    values = call.values(outputs, is_message=True)
    _check_type(source.dtype)
    if _are_equal(values):
        call.hold(sum(each.nbytes for each in values))
    gathered: list[torch.Tensor] = []

    def carry() -> Carried:
        works = []
        for rank, value in enumerate(values):
            part = _flat(source).clone() if rank == call.rank else _bytes_for(value)
            gathered.append(part)
            options = call.options(c10d.BroadcastOptions(), rootRank=rank)
            works.append(call.backend.transport("broadcast", [part], options))
        return Carried(works, finish)

    def finish() -> None:
        for value, part in zip(values, gathered, strict=True):
            value.copy_(part.view(value.dtype).view(value.shape))

    work = call.start(
        "ALLGATHER",
        carry,
        outputs=outputs,
        counts=(source.numel(), sum(each.numel() for each in values)),
    )
    return call["output_tensors"], work


def _bytes_for(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.numel() * value.element_size(), dtype=torch.uint8)


def _gathered(
    call: CollectiveCall, output: torch.Tensor, source: torch.Tensor
) -> dist.Work:
    flat = _flat(source)
    target = _flat(output)
    if target.untyped_storage()._cdata == flat.untyped_storage()._cdata:
        flat = flat.clone()  # a rank's part may be a view of the result
    return call.backend.transport("_allgather_base", target, flat)


def _check_gather(
    call: CollectiveCall, output: torch.Tensor, source: torch.Tensor
) -> None:
    if source.dtype != output.dtype:
        raise TypeError("output tensor must have the same type as input tensor")
    if source.numel() * call.size != output.numel():
        raise ValueError(
            "output tensor size must be equal to world_size times input tensor size"
        )


def all_gather_into_tensor(call: CollectiveCall) -> Any:
    """Run ``all_gather_into_tensor``."""
    target, source = call["output_tensor"], call["input_tensor"]
    values = call.values([source, target])
    _check_gather(call, target, source)
    _check_type(values[0].dtype)
    work = call.start(
        "_ALLGATHER_BASE",
        lambda: Carried([_gathered(call, values[1], values[0])]),
        outputs=[target],
        counts=(source.numel(), target.numel()),
    )
    return target, work


def all_gather_into_tensor_coalesced(call: CollectiveCall) -> Any:
    """Run ``all_gather_into_tensor`` of several tensors together."""
    outputs, inputs = call["outputs"], call["inputs"]
    targets, sources = call.values(outputs), call.values(inputs)
    for target, source in zip(outputs, inputs, strict=True):
        _check_gather(call, target, source)
        _check_type(sources[0].dtype)
    return call.start(
        "COALESCED",
        lambda: Carried(
            [
                _gathered(call, target, source)
                for target, source in zip(targets, sources, strict=True)
            ]
        ),
        outputs=outputs,
        counts=(
            sum(each.numel() for each in sources),
            sum(each.numel() for each in targets),
        ),
    )


def all_gather_coalesced(_call: CollectiveCall) -> Any:
    """Refuse, as NCCL does."""
    raise NotImplementedError("ProcessGroupNCCL does not support allgather_coalesced")


def gather(call: CollectiveCall) -> Any:
    """Run ``gather``."""
    root = call.root()
    source = call.one("input_tensors")
    is_root = call.rank == root
    outputs = call["output_tensors"][0] if is_root else []
    targets = call.values(outputs, is_message=True)
    _check_type(source.dtype)
    if is_root and len(targets) != call.size:
        raise ValueError(
            f"ProcessGroupNCCL::gather: Incorrect output list size {len(targets)}. "
            f"Output list size should be {call.size}, same as size of the process group."
        )
    for target, output in zip(targets, outputs, strict=True):
        if target.dtype != source.dtype:
            raise ValueError(
                "ProcessGroupNCCL::gather: invalid tensor type at index 0 (expected "
                f"{source.dtype}, got {output.dtype})"
            )
        if target.shape != source.shape:
            raise ValueError(
                "ProcessGroupNCCL::gather: invalid tensor size at index 0 (expected "
                f"{tuple(source.shape)}, got {tuple(output.shape)})"
            )
    parts = [] if source.is_meta else [_bytes_for(each) for each in targets]
    options = call.options(c10d.GatherOptions(), rootRank=root)

    def finish() -> None:
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part.view(target.dtype).view(target.shape))

    def carry() -> Carried:
        received = [parts] if is_root else []
        sent = [_flat(source.contiguous())]
        work = call.backend.transport("gather", received, sent, options)
        return Carried([work], finish)

    return call.start(
        "GATHER",
        carry,
        outputs=outputs,
        counts=(source.numel(), source.numel() * call.size),
    )


def scatter(call: CollectiveCall) -> Any:
    """Run ``scatter``."""
    root = call.root()
    target = call.one("output_tensors", is_message=True)
    is_root = call.rank == root
    sources = call.values(call["input_tensors"][0]) if is_root else []
    _check_type(target.dtype)
    if is_root and len(sources) != call.size:
        raise ValueError(
            f"ProcessGroupNCCL::scatter: Incorrect input list size {len(sources)}. "
            f"Input list size should be {call.size}, same as size of the process group."
        )
    part = target if target.is_meta else _bytes_for(target)
    options = call.options(c10d.ScatterOptions(), rootRank=root)

    def finish() -> None:
        target.copy_(part.view(target.dtype).view(target.shape))

    def carry() -> Carried:
        sent = [[_flat(each) for each in sources]] if is_root else []
        work = call.backend.transport("scatter", [part], sent, options)
        return Carried([work], finish)

    work = call.start(
        "SCATTER",
        carry,
        outputs=call["output_tensors"],
        counts=(target.numel() * call.size, target.numel()),
    )
    return call["output_tensors"], work


def all_to_all_single(call: CollectiveCall) -> Any:
    """Run ``all_to_all_single``."""
    output, source = call.values([call["output"], call["input"]], is_message=True)
    splits = []
    for name, value in (("output", output), ("input", source)):
        given = list(call[f"{name}_split_sizes"])
        rows = value.size(0) if value.dim() else 1
        if given and (len(given) != call.size or sum(given) != rows):
            raise RuntimeError("Split sizes doesn't match total dim 0 size")
        if not given and rows % call.size:
            raise RuntimeError(
                "Tensor's dim 0 does not divide equally across group size"
            )
        row = value[0].numel() * value.element_size() if rows and value.dim() else 0
        row = row or value.element_size()
        splits.append([each * row for each in given or [rows // call.size] * call.size])
    return _exchange(
        call, "ALLTOALL_BASE", ([output], splits[0]), ([source], splits[1])
    )


def all_to_all(call: CollectiveCall) -> Any:
    """Run ``all_to_all`` of lists."""
    both = []
    for name in ("output", "input"):
        values = call.values(call[f"{name}_tensors"], is_message=True)
        both.append((values, [each.nbytes for each in values]))
    return call["output_tensors"], _exchange(call, "ALLTOALL", *both)


def _exchange(
    call: CollectiveCall,
    what: str,
    into: tuple[list[torch.Tensor], list[int]],
    out_of: tuple[list[torch.Tensor], list[int]],
) -> Any:
    """Send each rank its bytes, and receive the bytes from the other ranks."""
    outputs, output_splits = into
    sources, input_splits = out_of
    for each in (*outputs, *sources):
        _check_type(each.dtype)
    received: list[torch.Tensor] = []

    def carry() -> Carried:
        received.append(torch.empty(sum(output_splits), dtype=torch.uint8))
        sent = torch.cat([_flat(each) for each in sources])
        work = call.backend.transport(
            "alltoall_base", received[0], sent, output_splits, input_splits
        )
        return Carried([work], finish)

    def finish() -> None:
        start = 0
        for value in outputs:
            _flat(value).copy_(received[0][start : start + value.nbytes])
            start += value.nbytes

    given = call.given.get("output_tensors") or [call["output"]]
    return call.start(
        what,
        carry,
        outputs=given,
        counts=(
            sum(each.numel() for each in sources),
            sum(each.numel() for each in outputs),
        ),
    )


def send(call: CollectiveCall) -> Any:
    """Run ``send``; NCCL does not support tags."""
    return _message(call, "SEND", call["dst"])


def receive(call: CollectiveCall) -> Any:
    """Run ``recv``."""
    return _message(call, "RECV", call["src"])


def _message(call: CollectiveCall, what: str, peer: int) -> Any:
    value = call.one("tensors", is_message=True)
    _check_type(value.dtype)
    name = what.lower()

    def carry() -> Carried:
        if not value.numel():
            return Carried(())
        return Carried([call.backend.transport(name, [_flat(value)], peer, 0)])

    return call.start(
        what,
        carry,
        outputs=call["tensors"],
        counts=(value.numel(), value.numel()),
        is_message=True,
    )


def receive_from_any(_call: CollectiveCall) -> Any:
    """Refuse, as NCCL does.

    Source: ``Backend::recvAnysource`` of ``Backend.hpp``.
    """
    raise RuntimeError("ProcessGroupNCCL does not support recvAnysource")


def barrier(call: CollectiveCall) -> Any:
    """Run ``barrier``: an ``all_reduce`` of one number, for which the host waits.

    The card is the first known one of these: that of ``device_ids``, the group's card,
    the card used before, the rank's card.
    """
    devices = call["device_ids"]
    bound = getattr(call.group, "bound_device_id", None)
    if devices:
        index = devices[0]
    elif bound is not None:
        index = bound.index
    else:
        index = call["tensor"].device.index
    card = card_of(index)
    call._use(card)
    if not call.backend.keeps_a_barrier_buffer:
        call.hold(torch.float32.itemsize)
    one = torch.zeros(1)
    options = call.options(c10d.AllreduceOptions())
    return call.start(
        "ALLREDUCE",
        lambda: Carried([call.backend.transport("allreduce", [one], options)]),
        outputs=[],
        counts=(1, 1),
    )


#: The function that runs each operator of ``torch.ops.c10d``.
_RUNS: Final[dict[str, Callable[[CollectiveCall], Any]]] = {
    "allreduce_": all_reduce,
    "allreduce_coalesced_": all_reduce_coalesced,
    "reduce_": reduce,
    "reduce_scatter_": reduce_scatter,
    "_reduce_scatter_base_": reduce_scatter_tensor,
    "reduce_scatter_tensor_coalesced_": reduce_scatter_tensor_coalesced,
    "broadcast_": broadcast,
    "allgather_": all_gather,
    "_allgather_base_": all_gather_into_tensor,
    "allgather_into_tensor_coalesced_": all_gather_into_tensor_coalesced,
    "allgather_coalesced_": all_gather_coalesced,
    "gather_": gather,
    "scatter_": scatter,
    "alltoall_base_": all_to_all_single,
    "alltoall_": all_to_all,
    "send": send,
    "recv_": receive,
    "recv_any_source_": receive_from_any,
    "barrier": barrier,
}


def collective_handler(func: Any, other: Handler) -> Handler:
    """Return a handler that runs a collective here for NCCL groups, else by ``other``."""

    def in_nccl(
        run: Any, group: c10d.ProcessGroup, backend: Any, given: dict[str, Any]
    ) -> Any:
        return run(CollectiveCall(run.__name__, group, backend, given))

    return by_group(
        func,
        other,
        _RUNS,
        in_nccl,
        lambda given: c10d.ProcessGroup.unbox(given["process_group"]),
    )


def by_group(
    func: Any,
    other: Handler,
    runs: Mapping[str, Callable[..., Any]],
    in_nccl: Callable[[Any, c10d.ProcessGroup, Any, dict[str, Any]], Any],
    group_of: Callable[[dict[str, Any]], c10d.ProcessGroup],
) -> Handler:
    """Return a handler that runs a collective as its process group requires.

    Args:
        func: The collective.
        other: Runs the collective if the group has no NCCL backend.
        runs: The function for each collective on cards, by name; ``other`` runs the rest.
        in_nccl: Called with the function from ``runs``, the group, its NCCL backend and
            the arguments by name.
        group_of: Returns the group from the arguments by name.
    """
    run = runs.get(func._schema.name.partition("::")[2])
    if run is None:
        return other
    names = [each.name for each in func._schema.arguments]

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        group = group_of(given)
        backend = backend_of(group)
        if backend is None:
            return other(args, kwargs)
        return in_nccl(run, group, backend, given)

    return handler
