"""What a module consists of, read without calling anything of the module's class.

A user's class may override ``named_modules`` or ``__getattr__``; torch keeps the parts in
three registries of the object itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    try:
        attributes = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return []
    found = attributes.get(kind)
    return [] if found is None else list(found.items())
