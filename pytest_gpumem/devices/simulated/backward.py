"""Whether autograd's own code is at work in a thread, or a user's that it has called."""

from __future__ import annotations

import functools
import threading
from typing import Any, Final

import torch

_task_id: Final[Any] = torch._C._current_graph_task_id  # no public way to ask
_NONE: Final = -1


class _Called(threading.local):
    """The backward pass that has called a user's code last, in this thread."""

    task_id: int = _NONE


_called: Final = _Called()


def in_backward() -> bool:
    """Tell whether autograd's C++ is at work in this thread.

    There, it makes helpers on what it takes for the tensors' device, the CPU: such an
    operand or target is no mistake, and no wish, of the user's.
    """
    task_id: int = _task_id()
    return task_id not in {_NONE, _called.task_id}


def of_user(function: Any) -> Any:
    """Return a function that a user has given to autograd, known as such when it runs.

    What it calls is held to devices as anywhere. A backward pass that it begins is
    autograd's work again.
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
