"""Reads the parts of a module without calling code of the module's class.

A user's class may override ``named_modules`` or ``__getattr__``; torch keeps the parts in
three registries of the object itself.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.parameter import is_lazy

from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Enters a block in which the program's modes and tensor classes do not see calls.
unseen: Final = torch._C.DisableTorchFunction  # noqa: SLF001  # no public name
#: The types of keys that are shown. The repr of another type may be the program's code.
_KEYS: Final = frozenset({str, int, bytes, bool, type(None)})


def modules_of(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield a module and all modules inside it, each once, with paths from the root."""
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        inner = [
            (f"{path}.{name}" if path else name, part)
            for name, part in registry(module, "_modules")
            if issubclass(type(part), torch.nn.Module)
        ]
        waiting += reversed(inner)


def tensors_of(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a module's own parameters and buffers, with their names."""
    for kind in ("_parameters", "_buffers"):
        for name, part in registry(module, kind):
            if issubclass(type(part), torch.Tensor):
                yield name, part


def registry(module: Any, kind: str) -> list[tuple[str, Any]]:
    """Return one of torch's registries of a module's parts.

    It is empty for a module that was not initialised completely.
    """
    found = dictionary_of(module).get(kind)
    return [] if found is None else list(found.items())


def tensors_held_by(model: Any) -> Iterator[torch.Tensor]:
    """Yield a model's tensors: parameters, buffers, gradients and plain attributes.

    Plain attributes are those of any module inside, also in lists and mappings; for
    example a cache of positions that is not a buffer.
    """
    for _path, module in modules_of(model):
        for _name, tensor in tensors_of(module):
            yield tensor
            if tensor.is_leaf and tensor.grad is not None:
                yield tensor.grad
        for value in vars(module).values():
            yield from (each for _how, each in tensors_in(value))


def tensors_in(
    value: Any, *, most: int = sys.maxsize
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a value if it is a tensor, or the tensors directly in it, with expressions.

    The members of lists, tuples and dictionaries are read, up to a number of them.
    """
    kind = type(value)
    if issubclass(kind, torch.Tensor):
        yield "", value
    elif issubclass(kind, (list, tuple)):
        # A user's subclass may have a __len__ or slices of its own.
        inner = list if issubclass(kind, list) else tuple
        for position, item in enumerate(islice(inner.__iter__(value), most)):
            if issubclass(type(item), torch.Tensor):
                yield f"[{position}]", item
    elif issubclass(kind, dict) and dict.__len__(value) <= most:
        for key, item in list(dict.items(value)):
            if issubclass(type(item), torch.Tensor):
                yield f"[{key!r}]" if type(key) in _KEYS else "[…]", item


def attributes_of(value: Any) -> dict[str, Any]:
    """Return an object's attributes, in slots and in its dictionary, by name."""
    found = {}
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if type(member) is MemberDescriptorType:
                with suppress(AttributeError):  # the slot is not set
                    found[name] = member.__get__(value)
    return {**found, **dictionary_of(value)}


def dictionary_of(value: Any) -> dict[str, Any]:
    """Return the dictionary of an object's attributes; empty without one."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def shape_words(tensor: torch.Tensor) -> str:
    """Return a tensor's shape and type."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


@dataclass(frozen=True, slots=True)
class Placement:
    """The devices and dtypes of a model's weights.

    Attributes:
        bytes_by_device: Bytes of parameters and buffers by device, for example
            ``{"cuda:0": 1340583944}``; offloaded weights count as ``"meta"``.
        dtypes: Dtypes of the floating-point parameters.
        device_map: The map by which accelerate dispatched the model; None without one.
        num_parameters: How many numbers its parameters have in total.
    """

    bytes_by_device: dict[str, int]
    dtypes: frozenset[torch.dtype]
    device_map: dict[str, str] | None
    num_parameters: int

    @property
    def devices(self) -> frozenset[str]:
        """The devices that hold weights."""
        return frozenset(self.bytes_by_device)

    @property
    def is_whole(self) -> bool:
        """Whether all weights are in one place, or spread by a device map."""
        return len(self.bytes_by_device) <= 1 or self.device_map is not None

    def __str__(self) -> str:
        places = ", ".join(
            f"{format_size(nbytes)} on {device}"
            for device, nbytes in sorted(self.bytes_by_device.items())
        )
        dtypes = ", ".join(sorted(str(dtype) for dtype in self.dtypes))
        spread = " by a device map" if self.device_map is not None else ""
        return f"{places}{spread} ({dtypes})"


def placement_of(model: torch.nn.Module) -> Placement:
    """Return the devices and dtypes of a model's weights; tied weights count once."""
    nbytes: Counter[str] = Counter()
    dtypes = set()
    count = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        if is_lazy(tensor):
            continue  # a lazy parameter has no size yet
        nbytes[str(tensor.device)] += tensor.numel() * tensor.element_size()
    for parameter in model.parameters():
        count += 0 if is_lazy(parameter) else parameter.numel()
        if parameter.is_floating_point():
            dtypes.add(parameter.dtype)
    device_map: Any = getattr(model, "hf_device_map", None)
    if device_map is not None:
        device_map = {name: str(device) for name, device in device_map.items()}
        if len(set(device_map.values())) == 1:
            device_map = None
    return Placement(dict(nbytes), frozenset(dtypes), device_map, count)
