"""Who holds objects where Python's garbage collector does not see it.

The collector knows the references between objects that it tracks. It does not know those
of functions that run, of the slots that tensors have in C++ (a gradient, a graph and what
it has saved), nor those of the interpreter itself (signal handlers).
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.instruments.parts import living
from pytest_gpumem.stacks import frames_from, variables_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

#: How many nodes of graphs are looked at, in all.
_NODES: Final = 20_000
_SAVED: Final = "_saved_"


class Place:
    """A holder that is no object: a place of the interpreter, in words."""

    def __init__(self, text: str) -> None:
        self.text: Final = text


class HiddenHolders:
    """The holders that the collector does not show, by what they hold.

    They are found when it is made, and held as long as it lives.

    Args:
        is_ours: Tells frames that are not to count.
    """

    def __init__(self, is_ours: Callable[[FrameType], bool]) -> None:
        #: One list, so that a search can leave it out.
        self.holders: Final[list[Any]] = []
        self._by_child: Final[dict[int, list[int]]] = {}
        for holder, child in _held(is_ours):
            self._note(holder, child)

    def add_graphs(self) -> None:
        """Find what graphs of autograd have saved too.

        Limits: tensors are unpacked for it, so hooks of ``saved_tensors_hooks`` run.
        """
        for holder, child in _saved():
            self._note(holder, child)

    def of(self, child: object) -> list[Any]:
        """Return the holders of an object."""
        return [self.holders[place] for place in self._by_child.get(id(child), ())]

    def _note(self, holder: Any, child: Any) -> None:
        self._by_child.setdefault(id(child), []).append(len(self.holders))
        self.holders.append(holder)


def _held(is_ours: Callable[[FrameType], bool]) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of a holder and what it holds."""
    for innermost in list(sys._current_frames().values()):  # noqa: SLF001  # the documented way to see other threads
        for frame in frames_from(innermost):
            # The variables of a module's own code are those of the module.
            if not is_ours(frame) and frame.f_code.co_name != "<module>":
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
            yield Place(f"the handler of signal {name}"), handler


def _saved() -> Iterator[tuple[torch.Tensor, Any]]:
    """Yield pairs of a tensor and what the graph behind it keeps for backward."""
    seen: set[int] = set()
    for tensor in living(torch.Tensor)[0]:
        waiting = [tensor.grad_fn]
        while waiting and len(seen) < _NODES:
            node = waiting.pop()
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            yield tensor, node  # of a torch.autograd.Function, an object with a dict
            for name in dir(node):
                if name.startswith(_SAVED) or name == "saved_tensors":
                    yield from ((tensor, each) for each in _unpacked(node, name))
            waiting += [each for each, _number in node.next_functions]


def _unpacked(node: Any, name: str) -> list[torch.Tensor]:
    try:
        value = getattr(node, name)
    except Exception:  # noqa: BLE001  # freed by backward, or a hook of the program's
        return []
    each = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in each if isinstance(one, torch.Tensor)]


def _gradient(tensor: torch.Tensor) -> torch.Tensor | None:
    try:
        return tensor.grad if tensor.is_leaf else None
    except Exception:  # noqa: BLE001  # a subclass that has none
        return None


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor that a view is of, and that it keeps; None for others."""
    try:
        return tensor._base  # noqa: SLF001  # torch's documented way
    except Exception:  # noqa: BLE001  # a subclass that has none
        return None
