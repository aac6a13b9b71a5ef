"""Runs ``torch.ops._c10d_functional`` and ``_dtensor`` in an NCCL group.

These operators allocate their results and call the collectives of ``collectives.py``.
Source: ``torch/csrc/distributed/c10d/Functional.cpp``. The results are complete when a
call returns, so ``wait_tensor`` has nothing to wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

from pytest_gpumem.devices.simulated.distributed.collectives import by_group
from pytest_gpumem.devices.simulated.refusals import refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices.simulated.tensor import Handler


def _options(made: Any, reduce_op: str) -> Any:
    made.reduceOp = getattr(dist.ReduceOp, reduce_op.upper())
    return made


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _longer(tensor: torch.Tensor, size: int) -> torch.Tensor:
    shape = list(tensor.shape) or [1]
    return tensor.new_empty([shape[0] * size, *shape[1:]])


def _shorter(tensor: torch.Tensor, size: int) -> torch.Tensor:
    shape = list(tensor.shape)
    if shape[0] % size:
        raise RuntimeError("Input tensor's dim 0 is not divisible by group size")
    return tensor.new_empty([shape[0] // size, *shape[1:]])


def _all_reduce_(group: Any, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
    group.allreduce([tensor], _options(c10d.AllreduceOptions(), reduce_op)).wait()
    return tensor


def _all_reduce(group: Any, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
    return _all_reduce_(group, _contiguous(tensor), reduce_op)


def _all_reduce_coalesced_(
    group: Any, tensors: Sequence[torch.Tensor], reduce_op: str
) -> list[torch.Tensor]:
    options = _options(c10d.AllreduceCoalescedOptions(), reduce_op)
    group.allreduce_coalesced(list(tensors), options).wait()
    return list(tensors)


def _all_reduce_coalesced(
    group: Any, tensors: Sequence[torch.Tensor], reduce_op: str
) -> list[torch.Tensor]:
    return _all_reduce_coalesced_(group, [*map(_contiguous, tensors)], reduce_op)


def _all_gather_into(
    group: Any, tensor: torch.Tensor, size: int, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    output = _longer(tensor, size) if out is None else out
    group._allgather_base(output, tensor.contiguous()).wait()
    return output


def _all_gather_coalesced(
    group: Any, tensors: Sequence[torch.Tensor], size: int
) -> list[torch.Tensor]:
    outputs = [_longer(each, size) for each in tensors]
    inputs = [each.contiguous() for each in tensors]
    group.allgather_into_tensor_coalesced(outputs, inputs).wait()
    return outputs


def _reduce_scatter(
    group: Any,
    tensor: torch.Tensor,
    reduce_op: str,
    size: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    output = _shorter(tensor, size) if out is None else out
    options = _options(c10d.ReduceScatterOptions(), reduce_op)
    group._reduce_scatter_base(output, tensor.contiguous(), options).wait()
    return output


def _reduce_scatter_coalesced(
    group: Any, tensors: Sequence[torch.Tensor], reduce_op: str, size: int
) -> list[torch.Tensor]:
    outputs = [_shorter(each, size) for each in tensors]
    inputs = [each.contiguous() for each in tensors]
    options = _options(c10d.ReduceScatterOptions(), reduce_op)
    group.reduce_scatter_tensor_coalesced(outputs, inputs, options).wait()
    return outputs


def _all_to_all(
    group: Any,
    tensor: torch.Tensor,
    output_sizes: Sequence[int],
    input_sizes: Sequence[int],
) -> torch.Tensor:
    output = tensor.new_empty([sum(output_sizes), *tensor.shape[1:]])
    group.alltoall_base(
        output, tensor.contiguous(), list(output_sizes), list(input_sizes)
    ).wait()
    return output


def _broadcast_(group: Any, tensor: torch.Tensor, source: int) -> torch.Tensor:
    options = c10d.BroadcastOptions()
    options.rootRank = source
    group.broadcast([tensor], options).wait()
    return tensor


def _broadcast(group: Any, tensor: torch.Tensor, source: int) -> torch.Tensor:
    return _broadcast_(group, _contiguous(tensor), source)


def _shard_other_dimension(
    group: Any, tensor: torch.Tensor, gather_dim: int, shard_dim: int
) -> torch.Tensor:
    """Run ``torch.ops._dtensor.shard_dim_alltoall``."""
    parts = torch.stack(tensor.chunk(group.size(), shard_dim))
    received = torch.empty_like(parts)
    group.alltoall_base(received, parts, [], []).wait()
    return torch.cat(received.unbind(), gather_dim)


def _message(*_args: Any, **_options: Any) -> None:
    refuse("a functional send or receive of torch.distributed")


#: The function that runs each operator; it gets the group instead of the group's name.
_RUNS: Final[dict[str, Callable[..., Any]]] = {
    "all_reduce": _all_reduce,
    "all_reduce_": _all_reduce_,
    "all_reduce_coalesced": _all_reduce_coalesced,
    "all_reduce_coalesced_": _all_reduce_coalesced_,
    "all_gather_into_tensor": _all_gather_into,
    "all_gather_into_tensor_out": _all_gather_into,
    "all_gather_into_tensor_coalesced": _all_gather_coalesced,
    "reduce_scatter_tensor": _reduce_scatter,
    "reduce_scatter_tensor_out": _reduce_scatter,
    "reduce_scatter_tensor_coalesced": _reduce_scatter_coalesced,
    "all_to_all_single": _all_to_all,
    "broadcast": _broadcast,
    "broadcast_": _broadcast_,
    "shard_dim_alltoall": _shard_other_dimension,
    "isend": _message,
    "irecv": _message,
    "batch_p2p_ops": _message,
}


def functional_handler(func: Any, other: Handler) -> Handler:
    """Return a handler that runs a collective here for NCCL groups, else by ``other``."""

    def in_nccl(run: Any, group: Any, _backend: Any, given: dict[str, Any]) -> Any:
        out = given.pop("out", None)
        options = {} if out is None else {"out": out}
        return run(group, *given.values(), **options)

    return by_group(
        func, other, _RUNS, in_nccl, lambda given: _group(given.pop("group_name"))
    )


def _group(named: Any) -> Any:
    """Return a group from its name or from the group itself."""
    if isinstance(named, str):
        return c10d._resolve_process_group(named)  # type: ignore[arg-type]  # returns the group of a name
    return (
        named
        if isinstance(named, c10d.ProcessGroup)
        else (c10d.ProcessGroup.unbox(named))
    )
