"""Lists of tensors in groups of one device and type, as foreach functions take them.

C++ groups by what it takes for the tensors' device, which is one for all cards, and for
wrapper subclasses around a card's tensors.
"""

from __future__ import annotations

from typing import Any, Final

import torch

_grouping: Final[Any] = torch._C._group_tensors_by_device_and_dtype


def grouping(lists: Any, with_indices: bool = False) -> Any:  # noqa: FBT001, FBT002  # torch's signature
    """``torch._C._group_tensors_by_device_and_dtype``, which knows cards."""
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
