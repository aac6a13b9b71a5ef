"""``torch.cuda.nccl``: NCCL for the cards of one process.

Source: ``torch/csrc/cuda/python_nccl.cpp`` and ``nccl.cpp``.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.torch_build import NCCL_VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence


def _version() -> int:
    major, minor, patch = NCCL_VERSION
    return major << 32 | minor << 16 | patch


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, tensors) / len(tensors)


#: The operations of ``ncclRedOp_t``, by number.
_OPERATIONS: Final = (
    lambda each: functools.reduce(torch.add, each),
    lambda each: functools.reduce(torch.mul, each),
    lambda each: functools.reduce(torch.maximum, each),
    lambda each: functools.reduce(torch.minimum, each),
    _mean,
)


def _values(tensors: Sequence[Any]) -> list[torch.Tensor]:
    """Return the values of tensors for NCCL.

    Raises:
        RuntimeError: There are no tensors, their sizes differ, or two are on one card.
    """
    if not tensors:
        raise RuntimeError("input sequence can't be empty")
    cards = set()
    for each in tensors:
        if not each.is_cuda or each.is_sparse:
            raise RuntimeError(
                "input and output elements have to be cuda dense Tensors"
            )
        if each.dtype != tensors[0].dtype:
            raise RuntimeError(
                "all inputs and outputs must be of the same Tensor dtype"
            )
        if not each.is_contiguous():
            raise RuntimeError("all inputs and outputs must be contiguous")
        cards.add(each.get_device())
    if len(cards) < len(tensors):
        raise RuntimeError("inputs must be on unique devices")
    return [each._gpumem_value for each in tensors]  # private to this package


def _reduce(inputs: Any, output: Any, _root: int, op: int, *_ignored: Any) -> None:
    values = _values(inputs)
    output._gpumem_value.copy_(_OPERATIONS[op](values))  # private to this package


def _all_reduce(inputs: Any, outputs: Any, op: int, *_ignored: Any) -> None:
    reduced = _OPERATIONS[op](_values(inputs))
    for each in _values(outputs):
        each.copy_(reduced)


def _broadcast(inputs: Any, root: int, *_ignored: Any) -> None:
    values = _values(inputs)
    for each in values:
        each.copy_(values[root].clone())


def _all_gather(inputs: Any, outputs: Any, *_ignored: Any) -> None:
    gathered = torch.cat([each.flatten() for each in _values(inputs)])
    for each in _values(outputs):
        each.copy_(gathered.view_as(each))


def _reduce_scatter(inputs: Any, outputs: Any, op: int, *_ignored: Any) -> None:
    reduced = _OPERATIONS[op](_values(inputs)).flatten()
    targets = _values(outputs)
    for each, part in zip(targets, reduced.chunk(len(targets)), strict=True):
        each.copy_(part.view_as(each))


#: Replacements in ``torch._C``; NCCL's unique ids and ranks are refused.
C_NCCL: Final[dict[str, Any]] = {
    "_nccl_version": _version,
    "_nccl_version_suffix": lambda: b"",
    "_nccl_reduce": _reduce,
    "_nccl_all_reduce": _all_reduce,
    "_nccl_broadcast": _broadcast,
    "_nccl_all_gather": _all_gather,
    "_nccl_reduce_scatter": _reduce_scatter,
}
