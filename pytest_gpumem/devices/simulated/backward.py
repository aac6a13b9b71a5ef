"""Whether autograd is at work in a thread."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Tell whether autograd is at work in this thread.

    There, torch's own C++ makes helpers on what it takes for the tensors' device, the
    CPU: such an operand or target is no mistake, and no wish, of the user's.
    """
    return bool(torch._C._current_graph_task_id() != -1)  # no public way to ask
