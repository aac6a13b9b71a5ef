"""Fake tensors (``torch._subclasses``) on simulated cards: shapes without values.

A build for CPUs has no device guard for CUDA, so methods in C++ that switch to a tensor's
device fail; the operators that they call do not.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor

from pytest_gpumem.devices.simulated.refusals import refuse

_aten: Final[Any] = torch.ops.aten
_base: Final[Any] = torch._C.TensorBase


def checked(tensor: Any) -> Any:
    """Refuse a fake tensor on a card that takes part in autograd: C++ would abort."""
    if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
        refuse("FakeTensorMode.from_tensor")
    return tensor


def _require_grad_of_fake(self: Any, wanted: bool = True) -> Any:  # noqa: FBT001, FBT002  # torch's signature
    return _base.requires_grad_(checked(self) if wanted else self, wanted)


def _set_grad_of_fake(self: Any, wanted: bool) -> None:  # noqa: FBT001  # a property's setter
    _base.requires_grad.__set__(checked(self) if wanted else self, wanted)


def _copy_into_fake(
    self: Any,
    source: torch.Tensor,
    non_blocking: bool = False,  # noqa: FBT001, FBT002  # torch's signature
) -> Any:
    """Run ``copy_`` of a fake tensor without switching to its device in C++.

    torch's own decompositions call it, such as that of ``uniform_``, when ``DTensor``
    looks for the shapes of a result. The method needs a device guard, and a build for
    CPUs has none for CUDA; the operator needs none.
    """
    if self.device.type != "cuda":
        return _base.copy_(self, source, non_blocking)
    return torch.ops.aten.copy_.default(self, source, non_blocking)


def _item_of_fake(self: Any, index: Any) -> Any:
    """Run ``x[index]`` of a fake tensor without switching to its device in C++."""
    if self.device.type != "cuda":
        return _base.__getitem__(self, index)
    view, indices = _indexed(self, index)
    if not indices:
        return _aten.alias.default(view) if view is self else view
    return _aten.index.Tensor(view, indices)


def _set_item_of_fake(self: Any, index: Any, value: Any) -> None:
    """Run ``x[index] = value`` of a fake tensor without switching to its device in C++."""
    if self.device.type != "cuda":
        _base.__setitem__(self, index, value)
        return
    is_mask = isinstance(index, torch.Tensor) and _is_mask(index)
    view, indices = (self, [index]) if is_mask else _indexed(self, index)
    if not isinstance(value, torch.Tensor):
        value = _aten.full.default((), value, dtype=self.dtype, device=self.device)
    if indices:
        _aten.index_put_.default(view, indices, value)
    else:
        _aten.copy_.default(view, value)


def _indexed(tensor: Any, index: Any) -> tuple[Any, list[torch.Tensor | None]]:
    """Apply an index except for its tensors; return the view, and each dimension's tensor.

    Source: ``applySlicing`` of ``torch/csrc/autograd/python_variable_indexing.cpp``.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    taken = sum(_taken(each) for each in parts)
    if not any(each is Ellipsis for each in parts):
        parts.append(Ellipsis)
    indices: list[torch.Tensor | None] = []
    view = tensor
    for number, each in enumerate(parts):
        dim = len(indices)
        if each is Ellipsis:
            indices += [None] * (tensor.dim() - taken)
        elif each is None:
            view = view.unsqueeze(dim)
            indices.append(None)
        elif isinstance(each, slice):
            step = 1 if each.step is None else each.step
            view = _aten.slice.Tensor(view, dim, each.start, each.stop, step)
            indices.append(None)
        elif isinstance(each, bool):
            view = view.unsqueeze(dim)
            count = [int(each)]
            indices.append(
                _aten.zeros.default(count, dtype=torch.int64, device=tensor.device)
            )
        elif isinstance(each, torch.Tensor) and (each.dim() or _is_mask(each)):
            masks = _aten.nonzero.default(each).unbind(1) if _is_mask(each) else (each,)
            indices += masks
        elif isinstance(each, torch.Tensor):
            view = view.select(dim, each.item())
        elif _is_number(each):
            added = sum(one is None for one in parts[:number])
            dimension = tensor.dim() - view.dim() + dim + added
            _check_bounds(view, dim, each, dimension)
            view = view.select(dim, each)
        else:
            indices.append(torch.as_tensor(each))
    return view, indices if any(each is not None for each in indices) else []


def _check_bounds(view: Any, dim: int, index: Any, dimension: int) -> None:
    """Check an index as C++ does; torch 2.9 and 2.10 accept any index of a fake tensor.

    Source: ``applySelect`` of ``ATen/TensorIndexing.h``.

    Raises:
        IndexError: The index is outside of the tensor's dimension ``dimension``.
    """
    if isinstance(index, torch.SymInt) or dim >= view.dim():
        return
    size = view.shape[dim]
    if type(size) is int and not -size <= operator.index(index) < size:
        raise IndexError(
            f"index {operator.index(index)} is out of bounds for dimension {dimension} "
            f"with size {size}"
        )


def _is_number(part: Any) -> bool:
    try:
        return isinstance(part, torch.SymInt) or operator.index(part) is not None
    except TypeError:  # a sequence, or an array
        return False


def _is_mask(part: torch.Tensor) -> bool:
    return part.dtype in {torch.bool, torch.uint8}


def _taken(part: Any) -> int:
    """Return how many dimensions a part of an index consumes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    is_mask = isinstance(part, torch.Tensor) and _is_mask(part)
    return part.dim() if is_mask else 1


#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (FakeTensor, "copy_", _copy_into_fake),
    (FakeTensor, "__getitem__", _item_of_fake),
    (FakeTensor, "__setitem__", _set_item_of_fake),
    (FakeTensor, "requires_grad_", _require_grad_of_fake),
    (
        FakeTensor,
        "requires_grad",
        property(_base.requires_grad.__get__, _set_grad_of_fake),
    ),
)
