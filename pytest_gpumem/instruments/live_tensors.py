"""Lists the tensors on a card with their owners, by one search of Python's objects.

The search is for the moment in which memory has run out. It reads the objects of the
garbage collector once and the stack once, and keeps no reference to them. ``holders.py``
has a slower search that finds more holders.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from pytest_gpumem.instruments.module_parts import (
    modules_of,
    registry,
    shape_words,
    tensors_in,
    tensors_of,
)
from pytest_gpumem.living_objects import living
from pytest_gpumem.records.incidents import LiveTensor, ModelSize
from pytest_gpumem.stacks import errors_behind, frames_from, variables_of

if TYPE_CHECKING:
    from types import FrameType

    from pytest_gpumem.devices import Device

#: The number of tensors that are shown, the largest first.
SHOWN: Final = 8
#: The most members of a container that are read.
_MEMBERS: Final = 1000
_HIDDEN: Final = frozenset(
    {"torch", "pytest_gpumem", "_pytest", "pluggy", "contextlib"}
)


class Survey(NamedTuple):
    """The tensors and models on a card.

    Attributes:
        tensors: The largest, with their owners.
        num_tensors: Number of storages.
        seen_bytes: Bytes of all storages.
        models: Models that are on the card, or on the stack.
        kept_bytes: Bytes of gradients and optimisers' state.
    """

    tensors: tuple[LiveTensor, ...]
    num_tensors: int
    seen_bytes: int
    models: tuple[ModelSize, ...]
    kept_bytes: int


def survey(device: Device, index: int, frame: FrameType | None) -> Survey:
    """Return the tensors and models on a card.

    ``frame`` is the innermost frame of the code that requested memory.
    """
    every, modules, optimizers = living(
        torch.Tensor, torch.nn.Module, torch.optim.Optimizer
    )
    names = _Names(device, index)
    tensors = {address(each): each for each in every if names.has(each)}
    on_stack = names.of_frames(frame)
    models = [
        size
        for root in _roots(modules)
        if (size := names.of_model(root, is_wanted=id(root) in on_stack)) is not None
    ]
    for each in optimizers:
        names.of_optimizer(each)
    del every, modules, optimizers
    # Equal sizes are sorted by name, because the order of living objects changes with
    # garbage collections.
    ranked = sorted(
        tensors.items(),
        key=lambda pair: (-pair[1].untyped_storage().nbytes(), names.owner(*pair)),
    )
    return Survey(
        tuple(
            LiveTensor(
                nbytes(tensor), shape_words(tensor), names.owner(storage_at, tensor)
            )
            for storage_at, tensor in ranked[:SHOWN]
        ),
        len(tensors),
        sum(nbytes(tensor) for tensor in tensors.values()),
        tuple(models),
        sum(nbytes(tensors[each]) for each in names.kept if each in tensors),
    )


def living_models() -> list[torch.nn.Module]:
    """Return every live model: the modules that are not part of another module."""
    return _roots(living(torch.nn.Module)[0])


class _Names:
    """Names of storages on a card; a model's part is preferred to a local variable."""

    def __init__(self, device: Device, index: int) -> None:
        self._device = device
        self._index = index
        self._parts: dict[int, str] = {}
        self._locals: dict[int, str] = {}
        #: Storages of gradients and optimisers' state.
        self.kept: set[int] = set()

    def has(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is on the card."""
        if not tensor.is_cuda or is_lazy(tensor) or tensor.layout != torch.strided:
            return False
        return self._device.holds(tensor.untyped_storage(), self._index)

    def owner(self, storage_at: int, tensor: torch.Tensor) -> str:
        """Return a storage's owner in words; empty if no owner was found."""
        graph = "" if tensor.grad_fn is None else "a result that autograd may need"
        return self._parts.get(storage_at) or self._locals.get(storage_at) or graph

    def of_model(self, root: torch.nn.Module, *, is_wanted: bool) -> ModelSize | None:
        """Name a model's parts; return its size if it is on the card or wanted."""
        kind = type(root).__name__
        whole = on_card = full = 0
        seen = set()
        layers: dict[str, int] = {}
        parts = [
            (layer, f"{layer}.{name}" if layer else name, part)
            for layer, module in modules_of(root)
            for name, part in tensors_of(module)
        ]
        for layer, name, part in parts:
            if is_lazy(part) or id(part) in seen:
                continue
            seen.add(id(part))
            size = part.numel() * part.element_size()
            whole += size
            full += size if part.dtype == torch.float32 else 0
            layers[layer] = layers.get(layer, 0) + size
            if self.has(part):
                on_card += size
                self._parts.setdefault(address(part), f"{name} of {kind}")
            gradient = part.grad if part.is_leaf else None
            if gradient is not None and self.has(gradient):
                storage_at = address(gradient)
                self._parts.setdefault(storage_at, f"gradient of {name} of {kind}")
                self.kept.add(storage_at)
        if not on_card and not (is_wanted and whole):
            return None
        largest = max(layers, key=lambda each: layers[each])
        return ModelSize(kind, whole, on_card, full, layers[largest], largest)

    def of_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Name an optimiser's state."""
        kind = type(optimizer).__name__
        for parameter, state in optimizer.state.items():
            if not isinstance(state, Mapping):
                continue
            whose = self._parts.get(address(parameter), "a parameter")
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and self.has(value):
                    storage_at = address(value)
                    self._parts.setdefault(storage_at, f"{key} of {kind} for {whose}")
                    self.kept.add(storage_at)

    def of_frames(self, frame: FrameType | None) -> set[int]:
        """Name the tensors in variables, from the innermost frame; return the modules' ids."""
        modules: set[int] = set()
        globals_seen: set[int] = set()
        for each, state in _frames(frame):
            code = each.f_code
            where = f"{code.co_name} ({Path(code.co_filename).name}:{each.f_lineno})"
            self._of_variables(variables_of(each), f"of {state}{where}", modules)
            if id(each.f_globals) not in globals_seen:
                globals_seen.add(id(each.f_globals))
                module = each.f_globals.get("__name__")
                self._of_variables(each.f_globals, f"of module {module}", modules)
        return modules

    def _of_variables(
        self, variables: Mapping[str, Any], where: str, modules: set[int]
    ) -> None:
        for name, value in list(variables.items()):
            if issubclass(type(value), torch.nn.Module):
                modules.add(id(value))
            for suffix, tensor in tensors_in(value, most=_MEMBERS):
                if self.has(tensor):
                    text = f"{name}{suffix} {where}"
                    self._locals.setdefault(address(tensor), text)


def _frames(frame: FrameType | None) -> Iterator[tuple[FrameType, str]]:
    """Yield frames that may hold tensors: running ones, then those of caught errors."""
    for each in frames_from(frame):
        if _is_shown(each):
            yield each, ""
    for error in errors_behind(sys.exc_info()[1]):
        for each, _line in traceback.walk_tb(error.__traceback__):
            if _is_shown(each):
                yield each, f"the traceback of {type(error).__name__} in "


def _is_shown(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__")
    return isinstance(name, str) and name.partition(".")[0] not in _HIDDEN


def _roots(modules: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Return the modules that are not part of another module."""
    inner = {id(part) for each in modules for _name, part in registry(each, "_modules")}
    return [each for each in modules if id(each) not in inner]


def address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage; 0 for a tensor without a storage."""
    return 0 if is_lazy(tensor) else tensor.untyped_storage().data_ptr()


def nbytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's storage."""
    return tensor.untyped_storage().nbytes()
