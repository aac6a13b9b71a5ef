"""The current stream of a card: the thread's own, or in backward that of the forward.

Note [Streams in backward]
On a card, autograd runs each node on the stream that was current when its forward ran,
and ignores the current stream of the caller of ``backward``. Nodes are identified by
their sequence numbers. A node is created directly before its operator runs, so the stream
of the next result is the node's stream.

The node that adds to a leaf's gradient has no such number. It is created directly before
the first node that uses the leaf, and so has the stream of that node.

Source: ``Node::stream`` of ``torch/csrc/autograd/function.h`` and its use in
``torch/csrc/autograd/engine.cpp``; ``grad_accumulator`` of
``torch/csrc/autograd/variable.cpp``.

Limits: each thread has its own sequence numbers. If several threads use streams in their
forwards at the same time, their nodes can be confused.
"""

from __future__ import annotations

import threading
from typing import Any, Final

import torch

_sequence: Final[Any] = torch._C._autograd._get_sequence_nr  # no public API
_current_node: Final[Any] = torch._C._current_autograd_node  # no public API
#: The name of nodes that accumulate gradients, and the key of their first user's number.
_ACCUMULATOR: Final = "torch::autograd::AccumulateGrad"
_USER: Final = "pytest_gpumem.first_user"
#: The largest number of nodes that are remembered.
_MOST: Final = 1_000_000


class Streams:
    """The current streams of a machine's cards.

    Attributes:
        are_used: Whether a stream other than the default stream was ever current.
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
        """Make a stream current on a card, for the thread or for the running node."""
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
        """Record the stream of the newest node, at the first result of its operator."""
        # In backward, nodes are created only for gradients of gradients.
        if _node() is None or torch.is_grad_enabled():
            key = (_sequence() - 1, index)
            if key not in self._of_nodes:
                if len(self._of_nodes) >= _MOST:
                    self._of_nodes.clear()
                self._of_nodes[key] = self.current(index)

    def note_leaves(self, nodes: list[Any]) -> None:
        """Record for each leaf below some nodes the number of the first node that uses it."""
        left = [each for each in nodes if each is not None]
        seen = set(left)
        first: dict[Any, int] = {}
        while left:
            node = left.pop()
            for below, _index in node.next_functions:
                if below is None:
                    continue
                if below.name() == _ACCUMULATOR:
                    number = int(node._sequence_nr())
                    first[below] = min(first.get(below, number), number)
                elif below not in seen:
                    seen.add(below)
                    left.append(below)
        for accumulator, number in first.items():
            accumulator.metadata.setdefault(_USER, number)


def _node() -> int | None:
    """Return the number of the autograd node that runs in this thread, or None.

    A node that accumulates a leaf's gradient has the number of the leaf's first user.
    """
    if torch._C._current_graph_task_id() == -1:  # no public API
        return None
    node = _current_node()
    if node is None:
        return -1
    if node.name() == _ACCUMULATOR:
        return int(node.metadata.get(_USER, -1))
    return int(node._sequence_nr())
