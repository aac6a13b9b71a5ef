"""Groups lists of tensors by device and dtype for foreach functions.

C++ groups by the device that it sees for the tensors. It sees the same device for all
cards, and for wrapper subclasses that contain a card's tensors.
"""

from __future__ import annotations

from typing import Any, Final

import torch

_grouping: Final[Any] = torch._C._group_tensors_by_device_and_dtype


def grouping(lists: Any, with_indices: bool = False) -> Any:  # noqa: FBT001, FBT002  # torch's signature
    """Run ``torch._C._group_tensors_by_device_and_dtype`` with the tensors' cards."""
    if not any(each.is_cuda for each in lists[0]):
        return _grouping(lists, with_indices)
    groups: dict[Any, tuple[list[list[Any]], list[int]]] = {}
    for index, first in enumerate(lists[0]):
        key = (first.device, first.dtype)
        members, indices = groups.setdefault(key, ([[] for _each in lists], []))
        for group, tensors in zip(members, lists, strict=True):
            if tensors:
                group.append(tensors[index])
        if with_indices:
            indices.append(index)
    return groups
