"""The current stream of a card: the thread's, or in backward that of the forward.

Note [Streams in backward]
On a card autograd runs each node on the stream that was current when its forward ran,
whatever stream the caller of ``backward`` is on. Nodes are told apart by their sequence
number: one is made right before its operator runs, so the first result after that says
on which stream.

Source: ``Node::stream`` of ``torch/csrc/autograd/function.h`` and its use in
``torch/csrc/autograd/engine.cpp``.

Limits: numbers are each thread's own; forwards of several threads that use streams at
once can be taken for each other's.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import torch

_sequence: Final[Any] = torch._C._autograd._get_sequence_nr  # no public name
_current_node: Final[Any] = torch._C._current_autograd_node  # no public name
#: So many nodes are remembered.
_MOST: Final = 1_000_000


class Streams:
    """The current streams of a machine's cards.

    Attributes:
        are_used: Whether any but the default stream was ever current.
    """

    def __init__(self) -> None:
        self.are_used = False
        self._local = threading.local()
        self._of_nodes: dict[tuple[int, int], int] = {}

    def current(self, index: int) -> int:
        """Return the handle of the calling thread's current stream on a card."""
        if not self.are_used:
            return 0
        node = _node()
        if node is None:
            streams: dict[int, int] = getattr(self._local, "streams", {})
            return streams.get(index, 0)
        chosen: dict[int, tuple[int, int]] = getattr(self._local, "chosen", {})
        number, stream = chosen.get(index, (-1, 0))
        if number == node:
            return stream
        return self._of_nodes.get((node, index), 0)

    def set(self, index: int, stream: int) -> None:
        """Make a stream current on a card: for the thread, or for the node that runs."""
        self.are_used = self.are_used or stream != 0
        node = _node()
        if node is not None:
            if not hasattr(self._local, "chosen"):
                self._local.chosen = {}
            self._local.chosen[index] = (node, stream)
            return
        if not hasattr(self._local, "streams"):
            self._local.streams = {}
        self._local.streams[index] = stream

    def note_result(self, index: int) -> None:
        """Remember the stream for the node that was made last, at its first result."""
        # In backward nodes are made for gradients of gradients alone.
        if _node() is None or torch.is_grad_enabled():
            key = (_sequence() - 1, index)
            if key not in self._of_nodes:
                if len(self._of_nodes) >= _MOST:
                    self._of_nodes.clear()
                self._of_nodes[key] = self.current(index)


def _node() -> int | None:
    """Return the number of the node that autograd runs in this thread; None for none."""
    if torch._C._current_graph_task_id() == -1:  # no public way to ask
        return None
    node = _current_node()
    return -1 if node is None else int(node._sequence_nr())
