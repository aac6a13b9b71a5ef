"""Copies results for a later comparison, with every tensor on the host."""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Callable, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from types import (
    AsyncGeneratorType,
    CoroutineType,
    FunctionType,
    GeneratorType,
    ModuleType,
)
from typing import Any, Final

import torch
from torch.nn.parameter import is_lazy

from pytest_gpumem.errors import NoValuesError
from pytest_gpumem.instruments.module_parts import attributes_of, placement_of

#: Types of values that are kept as they are: they define ==, or exist only once.
_PLAIN: Final = (
    *(str, bytes, bytearray, range, enum.Enum, type(None), type(...)),
    *(torch.dtype, torch.layout, torch.memory_format),
)
#: Types of objects that compute their values later, such as generators.
_LAZY: Final = (
    *(GeneratorType, CoroutineType, AsyncGeneratorType),
    *(map, filter, zip),
)
#: The depth of the search for tensors in objects that do not define ==.
_DEPTH: Final = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """The portrait of an object; only its class can be compared."""

    kind: type


class Fields(dict[str, Any]):
    """The portrait of an object's attributes, by name.

    Attributes:
        kind: Its class.
    """

    def __init__(self, kind: type, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.kind: Final = kind


class Unordered(list[Any]):
    """The items of a set whose items are not plain values."""


def portrait(value: Any) -> Any:
    """Return a copy of a result that can be compared later and holds no card memory.

    Tensors and arrays are copied to the CPU (to meta if the device keeps no values).
    Mappings, sequences, sets, dataclasses, and classes of attrs and pydantic are copied
    item by item. A module becomes its parameters, all its buffers, the training mode of
    each part, which parameters need gradients, and whether it is whole. Any other object
    becomes the tensors, arrays and modules among its public attributes. If it has none,
    it is kept as it is if its class defines ==; otherwise only its class is kept.

    Raises:
        TypeError: The value is a generator, or another object that computes its values
            later.
    """
    if issubclass(type(value), _LAZY):
        kind = type(value).__name__
        raise TypeError(
            f"the result is a {kind}, which has computed nothing yet: return its values, "
            "as list(...) does"
        )
    return _paint(value, (), _DEPTH)


def _paint(value: Any, above: tuple[int, ...], depth: int) -> Any:
    kind = type(value)  # a class may give a wrong type as its __class__
    if issubclass(kind, torch.Tensor):
        return _tensor(value)
    if id(value) in above:
        return Opaque(kind)  # the container contains itself

    def inner(item: Any) -> Any:
        return _paint(item, (*above, id(value)), depth)

    array = _array(value, kind)
    if array is not None:
        is_of_objects = getattr(getattr(array, "dtype", None), "kind", "") == "O"
        return inner(array.tolist()) if is_of_objects else array
    if issubclass(kind, _PLAIN):
        return value
    if issubclass(kind, (type, FunctionType, ModuleType)):
        return _name(value, kind)
    parts = _parts(value, kind, inner)
    return _object(value, kind, (*above, id(value)), depth) if parts is None else parts


def _name(value: Any, kind: type) -> str:
    name = getattr(value, "__qualname__", value.__name__)
    return f"{kind.__name__} {getattr(value, '__module__', '')}.{name}"


def _parts(value: Any, kind: type, inner: Callable[[Any], Any]) -> Any:  # noqa: PLR0911  # one for each kind of value
    """Return the portrait of a value with parts; None for any other value."""
    if issubclass(kind, torch.nn.Module):
        return _module(value, inner)
    if issubclass(kind, Mapping):
        return {key: inner(item) for key, item in value.items()}
    if issubclass(kind, tuple) and hasattr(kind, "_make"):
        return kind._make(map(inner, value))
    if issubclass(kind, (Sequence, ValuesView)):
        return [inner(item) for item in value]
    if issubclass(kind, AbstractSet):
        # Tensors are hashed by identity, so copies in a set would differ from each other.
        is_plain = {type(each) for each in value} <= {str, bytes, int, bool, type(None)}
        return frozenset(value) if is_plain else Unordered(map(inner, value))
    names = _field_names(kind)
    if names is None:
        return None
    return Fields(kind, {name: inner(getattr(value, name, Opaque)) for name in names})


def _tensor(tensor: torch.Tensor) -> Any:
    if is_lazy(tensor):
        return Opaque(type(tensor))
    tensor = tensor.detach()
    if tensor.is_meta:
        return tensor
    if tensor.is_nested:
        return [_tensor(part) for part in tensor.unbind()]
    try:
        return tensor.to("cpu", copy=True)
    except NoValuesError:
        return torch.empty_like(tensor, device="meta")


def _module(module: torch.nn.Module, inner: Callable[[Any], Any]) -> dict[str, Any]:
    placement = placement_of(module)
    # The state dict lacks non-persistent buffers.
    state = {**dict(module.named_buffers()), **module.state_dict()}
    return {
        "placement": "whole" if placement.is_whole else f"half moved: {placement}",
        "training": {name: part.training for name, part in module.named_modules()},
        "trains": {
            name: each.requires_grad for name, each in module.named_parameters()
        },
        "state": {name: inner(each) for name, each in state.items()},
    }


def _field_names(kind: type) -> list[str] | None:
    """Return the fields of a dataclass, or of a class of attrs or pydantic."""
    if dataclasses.is_dataclass(kind):
        return [each.name for each in dataclasses.fields(kind)]
    attrs = getattr(kind, "__attrs_attrs__", None)
    if attrs is not None:
        return [each.name for each in attrs]
    fields = getattr(kind, "__pydantic_fields__", None)
    return list(fields) if isinstance(fields, dict) else None


def _array(value: Any, kind: type) -> Any:
    """Return a copy of a numpy array or an array-like object; None for others."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not hasattr(kind, "__array__"):
        return None
    if issubclass(kind, numpy.generic):
        return bool(value) if issubclass(kind, numpy.bool_) else value
    try:
        return numpy.array(value)
    except Exception:  # noqa: BLE001  # the object only looks like an array
        return None


def _object(value: Any, kind: type, above: tuple[int, ...], depth: int) -> Any:
    attributes = attributes_of(value)
    if depth:
        painted = {
            name: _paint(item, above, depth - 1)
            for name, item in list(attributes.items())
            if not name.startswith("_") and type(item) not in {str, int, float, bool}
        }
        held = {name: item for name, item in painted.items() if _has_tensors(item)}
        if held:
            return Fields(kind, held)
    compares = any("__eq__" in vars(base) for base in kind.__mro__[:-1])
    return value if compares else Opaque(kind)


def _has_tensors(painted: Any) -> bool:
    if isinstance(painted, dict):
        return any(map(_has_tensors, painted.values()))
    if isinstance(painted, list):
        return any(map(_has_tensors, painted))
    return isinstance(painted, torch.Tensor) or type(painted).__module__ == "numpy"
