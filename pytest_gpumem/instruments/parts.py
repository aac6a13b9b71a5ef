"""What a module consists of, read without calling anything of the module's class.

A user's class may override ``named_modules`` or ``__getattr__``; torch keeps the parts in
three registries of the object itself.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A block in which the program's modes and tensor classes do not see what is asked of a
#: tensor.
unseen: Final = torch._C.DisableTorchFunction  # noqa: SLF001  # no public name


def living(*bases: type) -> tuple[list[Any], ...]:
    """Return all objects of each class that the collector knows, by one walk."""
    lists: tuple[list[Any], ...] = tuple([] for _ in bases)
    # There are a hundred thousand objects and a few thousand types.
    homes: dict[type, list[Any] | None] = {}
    for each in gc.get_objects():
        kind = type(each)
        if kind not in homes:
            pairs = zip(bases, lists, strict=True)
            homes[kind] = next(
                (to for base, to in pairs if issubclass(kind, base)), None
            )
        home = homes[kind]
        if home is not None:
            home.append(each)
    return lists


def modules_of(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield a module and all inside it, each once, with their paths from the root."""
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
    """Return one of torch's registries of a module's parts; empty for a torn module.

    Args:
        module: The module.
        kind: ``"_modules"``, ``"_parameters"`` or ``"_buffers"``.
    """
    found = dictionary_of(module).get(kind)
    return [] if found is None else list(found.items())


def tensors_held_by(model: Any) -> Iterator[torch.Tensor]:
    """Yield what a model holds: parameters, buffers, gradients and plain attributes.

    Plain attributes are those of any module inside, also in lists and mappings: a cache
    of positions, say, that is no buffer.
    """
    for _path, module in modules_of(model):
        for _name, tensor in tensors_of(module):
            yield tensor
            if tensor.is_leaf and tensor.grad is not None:
                yield tensor.grad
        for value in vars(module).values():
            yield from _tensors_among(value)


def _tensors_among(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (item for item in value.values() if isinstance(item, torch.Tensor))
    elif isinstance(value, (list, tuple)):
        yield from (item for item in value if isinstance(item, torch.Tensor))


def attributes_of(value: Any) -> dict[str, Any]:
    """Return what an object has in its slots and its dictionary, by name."""
    found = {}
    for kind in type(value).__mro__:
        for name, member in vars(kind).items():
            if type(member) is MemberDescriptorType:
                with suppress(AttributeError):  # it is not set
                    found[name] = member.__get__(value)
    return {**found, **dictionary_of(value)}


def dictionary_of(value: Any) -> dict[str, Any]:
    """Return the dictionary in which an object has its attributes; empty without."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}


def shape_words(tensor: torch.Tensor) -> str:
    """Return a tensor's shape and type."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"
