"""Finds what holds tensors on a card: traceback frames, log records, modules, globals, ….

A search starts at a tensor and follows references to its holders, until it reaches an
object that needs no holder: a running frame, a module's globals, a thread. The chain of
references is described in words, so that a person can see how to free the memory.
"""

from __future__ import annotations

import contextvars
import gc
import logging
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.instruments.reference_chains import (
    InterpreterHolder,
    base_of,
    path_in_words,
    runs,
    tensor_words,
)
from pytest_gpumem.living_objects import living
from pytest_gpumem.sizes import format_size
from pytest_gpumem.stacks import frames_from, variables_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.devices import Device

#: The most references in a chain, and the most objects that each step follows.
_DEPTH: Final = 24
_BREADTH: Final = 4000
#: The number of tensors for which holders are searched, the largest first.
_TRACED: Final = 3
#: The most objects of one search.
_VISITED: Final = 20_000
_NOBODY: Final = (
    "no Python object that can be named (a graph of autograd, or running C++ code)"
)
#: The beginning of the description of a cycle.
CYCLE: Final = "a reference cycle, which only a collection frees"
#: The most nodes of autograd graphs of one search.
_NODES: Final = 20_000
_SAVED: Final = "_saved_"
#: The attributes of a node: tensors that a torch.autograd.Function has saved, and the leaf
#: that gets the gradient.
#: Source: torch ``csrc/autograd/python_function.cpp``, ``functions/accumulate_grad.h``.
_KEPT: Final = frozenset({"saved_tensors", "variable"})
_OURS: Final = str(Path(__file__).parent)


#: Objects at which a search ends, because they need no holder.
_ROOTS: Final = (
    ModuleType,
    logging.LogRecord,
    threading.Thread,
    contextvars.Context,
    InterpreterHolder,
)


def blocks_on_cards() -> set[int]:
    """Return the addresses of all storages on cards, to recognise new ones later."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors()}


def find_holders(
    device: Device, before: Iterable[int] = (), *, only_cycles: bool = False
) -> tuple[str, ...]:
    """Return the largest tensors on the cards with their holders, one line each.

    Args:
        device: The device, which knows the size of a block.
        before: Addresses of storages to leave out; see ``blocks_on_cards``.
        only_cycles: Whether to return only tensors that nothing but a reference cycle
            holds; the next garbage collection frees these.

    Limits: a holder in C++ is found only if it is a gradient or an autograd graph.
    References that the interpreter does not show (arguments of ``atexit.register``) are
    not found.
    """
    hidden: list[_Hidden] = []
    found = []
    for nbytes, tensor, ignored in _largest(device, before):
        holder = _holder(tensor, ignored, hidden)
        if holder.startswith(CYCLE) or not only_cycles:
            found.append(f"{format_size(nbytes)} ({tensor_words(tensor)}): {holder}")
    return tuple(found)


def _largest(
    device: Device, before: Iterable[int]
) -> Iterator[tuple[int, torch.Tensor, Any]]:
    """Yield the largest tensors, each with the objects of this search that hold it."""
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
    """Return the tensors on cards; torch 2.8 also lists TorchScript's empty tensors."""
    has_storage = torch._C._has_storage  # noqa: SLF001  # no public API
    return [
        each for each in living(torch.Tensor)[0] if each.is_cuda and has_storage(each)
    ]


def _holder(value: Any, ignored: Any, hidden: list[_Hidden]) -> str:
    """Return the shortest chain from an object to what keeps it alive, in words.

    The objects in ``ignored`` belong to the caller and are left out. ``hidden`` is filled
    by the first call, and later calls use it again.
    """
    try:
        if not hidden:
            hidden.append(_Hidden())
        left_out = [hidden[0].holders, ignored]
        found = _search(value, hidden[0], left_out)
        if found.startswith(CYCLE) or found == _NOBODY:
            hidden[0].add_graphs()
            of_graphs = _search(value, hidden[0], left_out)
            found = found if of_graphs == _NOBODY else of_graphs
    except Exception as error:  # noqa: BLE001  # code of the program's own classes may raise
        return f"what holds it cannot be looked at: {type(error).__name__}"
    return found


def _search(value: Any, hidden: _Hidden, left_out: list[Any]) -> str:
    """Return the chain in words, with the hidden holders that are known so far."""
    parents: dict[int, Any] = {}
    visited = [value]
    seen = {id(value), id(parents), id(visited), id(left_out), *map(id, left_out)}
    level = [value]
    seen.add(id(seen))
    for _ in range(_DEPTH):
        referrers = _referrers(level, seen, hidden)
        next_level = []
        for child, holder in referrers:
            seen.add(id(holder))
            parents[id(holder)] = child
            if _is_root(holder):
                way = [holder]
                while way[-1] is not value:
                    way.append(parents[id(way[-1])])
                return path_in_words(way[::-1])
            next_level.append(holder)
            visited.append(holder)
        level = next_level[:_BREADTH]
        del referrers, next_level
        if not level or len(visited) > _VISITED:
            break
    cycle = _cycle(visited)
    if cycle:
        return f"{CYCLE}: {path_in_words(cycle)}"
    return _NOBODY


def _referrers(
    level: list[Any], seen: set[int], hidden: _Hidden
) -> list[tuple[Any, Any]]:
    """Return pairs of an object of the level and one that refers to it."""
    members = {id(each) for each in level}
    pairs = [
        (child, holder)
        for child in level
        for holder in hidden.of(child)
        if id(holder) not in seen
    ]
    for holder in gc.get_referrers(*level):
        if id(holder) in seen or holder is level or holder is pairs:
            continue
        if _is_ours(holder):
            continue
        child = next(
            (each for each in gc.get_referents(holder) if id(each) in members), None
        )
        if child is not None:
            pairs.append((child, holder))
    return pairs


def _is_ours(holder: Any) -> bool:
    return isinstance(holder, FrameType) and holder.f_code.co_filename.startswith(_OURS)


def _is_root(holder: Any) -> bool:
    return isinstance(holder, _ROOTS) or (
        isinstance(holder, FrameType) and runs(holder)
    )


def _cycle(visited: list[Any]) -> list[Any]:
    """Return the chain from the first object to a cycle and once around the cycle.

    Without a cycle it is empty.
    """
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


# -- what the collector does not see ------------------------------------------------------


class _Hidden:
    """The holders that the garbage collector does not show, by the objects that they hold.

    The garbage collector knows the references between the objects that it tracks. It does
    not know the references of running functions, of a tensor's slots in C++ (its gradient,
    its graph and what the graph has saved) and of the interpreter (signal handlers). They
    are found when this object is made, and it keeps references to them.
    """

    def __init__(self) -> None:
        #: A search leaves this list out, because it would find it as a holder.
        self.holders: Final[list[Any]] = []
        self._by_child: Final[dict[int, list[int]]] = {}
        for holder, child in _held():
            self._note(holder, child)

    def add_graphs(self) -> None:
        """Also find the tensors that autograd graphs have saved.

        Limits: saved tensors are unpacked, so hooks of ``saved_tensors_hooks`` run.
        """
        for holder, child in _saved():
            self._note(holder, child)

    def of(self, child: object) -> list[Any]:
        """Return the holders of an object."""
        return [self.holders[place] for place in self._by_child.get(id(child), ())]

    def _note(self, holder: Any, child: Any) -> None:
        self._by_child.setdefault(id(child), []).append(len(self.holders))
        self.holders.append(holder)


def _held() -> Iterator[tuple[Any, Any]]:
    """Yield pairs of a holder and what it holds."""
    for innermost in list(sys._current_frames().values()):  # noqa: SLF001  # the documented way to see other threads
        for frame in frames_from(innermost):
            # The local variables of a module's top-level code are the module's globals.
            if not _is_ours(frame) and frame.f_code.co_name != "<module>":
                for value in variables_of(frame).values():
                    yield frame, value
    for tensor in living(torch.Tensor)[0]:
        gradient = _gradient(tensor)
        if gradient is not None:
            yield tensor, gradient
        base = base_of(tensor)
        if base is not None:
            yield tensor, base
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler):
            name = signal.Signals(number).name
            yield InterpreterHolder(f"the handler of signal {name}"), handler


def _saved() -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield pairs of a tensor and what the graph behind it keeps for backward."""
    # The nodes are kept, because a new node could get the id of a deleted one.
    seen: dict[int, Any] = {}
    for tensor in living(torch.Tensor)[0]:
        waiting = [tensor.grad_fn]
        while waiting and len(seen) < _NODES:
            node = waiting.pop()
            if node is None or id(node) in seen:
                continue
            seen[id(node)] = node
            yield tensor, node  # a torch.autograd.Function keeps tensors as attributes
            for name in dir(node):
                if name.startswith(_SAVED) or name in _KEPT:
                    yield from ((tensor, each) for each in _unpacked(node, name))
            waiting += [each for each, _number in node.next_functions]


def _unpacked(node: Any, name: str) -> list[torch.Tensor]:
    try:
        value = getattr(node, name)
    except Exception:  # noqa: BLE001  # backward has freed it, or a hook raised
        return []
    each = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in each if isinstance(one, torch.Tensor)]


def _gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    try:
        return tensor.grad if tensor.is_leaf else None
    except Exception:  # noqa: BLE001  # a subclass may have no gradient
        return None
