"""Detects whether a thread runs autograd's own code or user code that autograd called."""

from __future__ import annotations

import functools
import threading
from typing import Any, Final

import torch

_task_id: Final[Any] = torch._C._current_graph_task_id  # no public API
_NONE: Final = -1


class _Called(threading.local):
    """The last backward pass that called user code in this thread."""

    task_id: int = _NONE


_called: Final = _Called()


def in_backward() -> bool:
    """Return whether this thread runs autograd's C++ code.

    This code creates helper tensors on the device that it sees for the tensors, which is
    the CPU. The user has not chosen the device of such an operand or target.
    """
    task_id: int = _task_id()
    return task_id not in {_NONE, _called.task_id}


def of_user(function: Any) -> Any:
    """Wrap a function that a user has passed to autograd, so that it counts as user code.

    Operators that the function calls check devices as usual. A backward pass that the
    function starts is autograd's own code again.
    """

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        outer, _called.task_id = _called.task_id, _task_id()
        try:
            return function(*args, **options)
        finally:
            _called.task_id = outer

    return called
