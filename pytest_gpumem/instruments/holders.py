"""Who holds tensors on a card: traceback frames, log records, modules, globals, ….

Follows references from a tensor outwards until something that needs no holder: a
running frame, a module's globals, a thread. The way there, in words, is what a person
needs to free the memory.
"""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    ModuleType,
    TracebackType,
)
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.devices import Device

#: How far from a tensor a holder is looked for, and how many objects on the way.
_DEPTH: Final = 24
_BREADTH: Final = 4000
#: How many tensors are traced; the largest come first.
_TRACED: Final = 3
#: How the words for what a cycle holds begin.
CYCLE: Final = "a reference cycle, which only a collection frees"
_OURS: Final = str(Path(__file__).parent)


class Held(NamedTuple):
    """A block on a card and who holds it.

    Attributes:
        nbytes: Bytes of the block.
        tensor: The tensor, in words.
        holder: The way from the tensor to its holder, in words.
    """

    nbytes: int
    tensor: str
    holder: str

    def __str__(self) -> str:
        return f"{format_size(self.nbytes)} ({self.tensor}): {self.holder}"


def blocks_on_cards() -> set[int]:
    """Return the addresses of all storages on cards, to tell later ones from them."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors()}


def find_holders(device: Device, before: Iterable[int] = ()) -> list[Held]:
    """Return the largest tensors on the cards and who holds them.

    Args:
        device: Knows the size of a block.
        before: Addresses of storages to leave out; see ``blocks_on_cards``.

    Limits: what only C++ holds (a graph's saved tensors) is named by its graph node
    where Python can see that, else not at all.
    """
    found: list[Held] = []
    for nbytes, tensor, ignored in _largest(device, before):
        holder = _holder(tensor, ignored)
        found.append(Held(nbytes, _words(tensor), holder))
    return found


def find_cycles(device: Device, before: Iterable[int] = ()) -> list[Held]:
    """Return those of the largest tensors that reference cycles alone hold.

    To be asked before a collection, which frees them.

    Args:
        device: Knows the size of a block.
        before: Addresses of storages to leave out; see ``blocks_on_cards``.
    """
    found: list[Held] = []
    for nbytes, tensor, ignored in _largest(device, before):
        holder = _holder(tensor, ignored)
        if holder.startswith(CYCLE):
            found.append(Held(nbytes, _words(tensor), holder))
    return found


def _holder(tensor: torch.Tensor, ignored: Any) -> str:
    """Return who holds a tensor; a class of the program's may not want to be asked."""
    try:
        return describe_holder(tensor, ignored=[ignored])
    except Exception as error:  # noqa: BLE001  # whatever it is, a verdict is due
        return f"what holds it cannot be looked at: {type(error).__name__}"


def _largest(
    device: Device, before: Iterable[int]
) -> Iterator[tuple[int, torch.Tensor, Any]]:
    """Yield the largest tensors, and what else holds each of them here."""
    known = set(before)
    largest: dict[int, tuple[int, torch.Tensor]] = {}
    for tensor in _tensors():
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in known and address not in largest:
            largest[address] = (device.block_bytes(storage), tensor)
    ranked = sorted(largest.values(), key=lambda pair: -pair[0])
    del largest
    del ranked[_TRACED:]
    while ranked:
        nbytes, tensor = ranked.pop(0)
        yield nbytes, tensor, ranked


def _tensors() -> list[torch.Tensor]:
    return [
        each
        for each in gc.get_objects()
        if issubclass(type(each), torch.Tensor) and each.is_cuda
    ]


def _words(tensor: torch.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    kind = "gradient-tracked " if tensor.grad_fn is not None else ""
    return f"{kind}{shape} {str(tensor.dtype).removeprefix('torch.')}"


def describe_holder(value: Any, *, ignored: Iterable[Any] = ()) -> str:
    """Return the shortest way from an object to what keeps it alive, in words.

    Args:
        value: The object.
        ignored: Objects of the caller's own that hold it too.
    """
    parents: dict[int, Any] = {}
    visited = [value]
    seen = {id(value), id(parents), id(visited), *map(id, ignored)}
    level = [value]
    seen.add(id(seen))
    for _ in range(_DEPTH):
        referrers = _referrers(level, seen)
        next_level = []
        for child, holder in referrers:
            seen.add(id(holder))
            parents[id(holder)] = child
            if _is_root(holder):
                return _path(_way(holder, parents, value))
            next_level.append(holder)
            visited.append(holder)
        level = next_level[:_BREADTH]
        del referrers, next_level
        if not level:
            break
    cycle = _cycle(visited)
    if cycle:
        return f"{CYCLE}: {_path(cycle)}"
    return "no Python object that can be named (a graph of autograd, or C++ at work)"


def _referrers(level: list[Any], seen: set[int]) -> list[tuple[Any, Any]]:
    """Return pairs of an object of the level and one that refers to it."""
    members = {id(each) for each in level}
    pairs = []
    for holder in gc.get_referrers(*level):
        if id(holder) in seen or holder is level or _is_ours(holder):
            continue
        child = next(
            (each for each in gc.get_referents(holder) if id(each) in members), None
        )
        if child is not None:
            pairs.append((child, holder))
    return pairs


def _is_ours(holder: Any) -> bool:
    if isinstance(holder, FrameType):
        return holder.f_code.co_filename.startswith(_OURS)
    return isinstance(holder, BuiltinFunctionType)


def _is_root(holder: Any) -> bool:
    return isinstance(holder, (ModuleType, logging.LogRecord, threading.Thread)) or (
        isinstance(holder, FrameType) and _runs(holder)
    )


def _runs(frame: FrameType) -> bool:
    current: FrameType | None = None
    for running in sys._current_frames().values():  # noqa: SLF001  # the documented way to see other threads
        current = running
        while current is not None and current is not frame:
            current = current.f_back
        if current is frame:
            break
    # The last of them is this very frame: it would be a cycle that holds the tensors.
    del running
    return current is frame


def _way(root: Any, parents: dict[int, Any], value: Any) -> list[Any]:
    """Return the objects from a value to its root."""
    chain = [root]
    while chain[-1] is not value:
        chain.append(parents[id(chain[-1])])
    chain.reverse()
    return chain


def _cycle(visited: list[Any]) -> list[Any]:
    """Return the way from the first object into a cycle and once around it, if any."""
    by_id = {id(each): each for each in visited}
    referrers: dict[int, list[int]] = {}
    for holder in visited[1:]:
        for child in {id(each) for each in gc.get_referents(holder)} & by_id.keys():
            referrers.setdefault(child, []).append(id(holder))
    way = [id(visited[0])]
    dead: set[int] = set()
    while way:
        above = [each for each in referrers.get(way[-1], ()) if each not in dead]
        if not above:
            dead.add(way.pop())
            continue
        around = next((each for each in above if each in way), None)
        if around is not None:
            return [by_id[each] for each in [*way, around]]
        way.append(above[0])
    return []


def _path(chain: list[Any]) -> str:
    """Return the way from a value to its holder, in words."""
    steps = []
    names: list[str] = []
    for child, holder in itertools.pairwise(chain):
        if isinstance(holder, dict) and _is_registry(holder, chain):
            names.insert(0, str(_key(holder, child)))
        elif isinstance(holder, torch.nn.Module) and names:
            if _is_inside_another(holder, chain):
                continue
            steps.append(f"{'.'.join(names)!r} of {type(holder).__name__}")
            names = []
        elif not (isinstance(child, dict) and _is_registry(child, chain)):
            steps.append(_step(holder, child))
    return ", ".join(step for step in steps if step)


def _is_registry(holder: dict[Any, Any], chain: list[Any]) -> bool:
    """Tell whether a dictionary is where a module of the chain keeps its parts."""
    return any(
        any(holder is registry for registry in _registries(each))
        for each in chain
        if isinstance(each, torch.nn.Module)
    )


def _is_inside_another(module: torch.nn.Module, chain: list[Any]) -> bool:
    return any(
        _key(each._modules, module) is not None  # noqa: SLF001  # torch's registry of parts
        for each in chain
        if isinstance(each, torch.nn.Module)
    )


def _registries(module: torch.nn.Module) -> tuple[Any, ...]:
    return module._parameters, module._buffers, module._modules  # noqa: SLF001  # torch's registries of parts


def _step(holder: Any, child: Any) -> str:
    """Return how one object holds another, in words; empty for mere containers."""
    for kinds, describe in _WORDS:
        if isinstance(holder, kinds):
            return describe(holder, child)
    name = _key(getattr(holder, "__dict__", {}), child)
    kind = type(holder).__name__
    return f"attribute {name!r} of a {kind}" if name else f"a {kind}"


def _frame(holder: FrameType, child: Any) -> str:
    code = holder.f_code
    place = f"{code.co_name} ({Path(code.co_filename).name}:{holder.f_lineno})"
    name = _key(holder.f_locals, child)
    state = "running " if _runs(holder) else ""
    return f"local {name!r} of {state}{place}" if name else f"{state}{place}"


def _traceback(_holder: TracebackType, child: Any) -> str:
    return "a traceback" if isinstance(child, FrameType) else ""


def _error(holder: BaseException, _child: Any) -> str:
    return f"{type(holder).__name__}({str(holder)[:60]!r})"


def _record(holder: logging.LogRecord, _child: Any) -> str:
    return (
        f"a log record of logger {holder.name!r} ({holder.getMessage()[:60]!r}), kept "
        "by a handler (pytest's log capture keeps records until teardown)"
    )


def _module(holder: ModuleType, child: Any) -> str:
    return "" if child is vars(holder) else f"module {holder.__name__}"


def _mapping(holder: Mapping[Any, Any], child: Any) -> str:
    key = _key(holder, child)
    module = sys.modules.get(str(holder.get("__name__")))
    if module is not None and vars(module) is holder:
        return f"global {key!r} of {holder['__name__']}"
    return f"entry {key!r}" if key else ""


def _container(holder: Any, _child: Any) -> str:
    return f"a {type(holder).__name__} of {len(holder)}"


_WORDS: Final[tuple[tuple[Any, Callable[[Any, Any], str]], ...]] = (
    (FrameType, _frame),
    (TracebackType, _traceback),
    (BaseException, _error),
    (logging.LogRecord, _record),
    (ModuleType, _module),
    (Mapping, _mapping),
    (CellType, lambda _holder, _child: "a closure"),
    (FunctionType, lambda holder, _child: f"function {holder.__qualname__}"),
    (
        (GeneratorType, CoroutineType),
        lambda holder, _child: f"suspended {holder.__qualname__}",
    ),
    (threading.Thread, lambda holder, _child: f"thread {holder.name!r}"),
    ((list, tuple, set, frozenset), _container),
)


def _key(mapping: Mapping[Any, Any], child: Any) -> str | None:
    """Return under which key a mapping has an object; None if it has not."""
    for key, item in list(mapping.items()):
        if item is child:
            return str(key)
    return None
