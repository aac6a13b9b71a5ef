"""Tells whether a thread runs autograd's own code, or user code that autograd called."""

from __future__ import annotations

import functools
import threading
from typing import Any, Final

import torch

_task_id: Final[Any] = torch._C._current_graph_task_id  # no public way to ask
_NONE: Final = -1


class _Called(threading.local):
    """The backward pass that was the last to call user code in this thread."""

    task_id: int = _NONE


_called: Final = _Called()


def in_backward() -> bool:
    """Tell whether autograd's C++ code runs in this thread.

    It makes helper tensors on the device that it sees for the tensors, the CPU. Such an
    operand or target was not chosen by the user.
    """
    task_id: int = _task_id()
    return task_id not in {_NONE, _called.task_id}


def of_user(function: Any) -> Any:
    """Wrap a function that a user has given to autograd, so that it counts as user code.

    Operators that it calls check devices as everywhere. A backward pass that it starts
    is autograd's own code again.
    """

    @functools.wraps(function)
    def called(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        outer, _called.task_id = _called.task_id, _task_id()
        try:
            return function(*args, **options)
        finally:
            _called.task_id = outer

    return called
