"""Look at frames, and let go of what those of a handled exception keep alive."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType


def clear_exception(error: BaseException) -> None:
    """Clear the locals of every frame of an exception and of those it is chained to.

    Tensors that only these frames hold are freed. Frames that still run keep theirs.

    Args:
        error: The exception; its text and line numbers stay.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        trace = current.__traceback__
        while trace is not None:
            clear_frame(trace.tb_frame)
            trace = trace.tb_next
        waiting += [current.__cause__, current.__context__]


def clear_frame(frame: FrameType) -> None:
    """Clear one frame's locals, unless it still runs.

    ``frame.clear`` leaves alone the dictionary that an earlier look at ``f_locals``
    made (pytest's tracebacks look, before Python 3.13); looking again brings it in
    line with the cleared frame.
    """
    try:
        frame.clear()
    except RuntimeError:
        return  # it runs, or is a suspended coroutine
    _ = frame.f_locals


def locals_of(frame: FrameType, *names: str) -> dict[str, Any]:
    """Return a frame's variables, and leave nothing behind that holds them.

    Before Python 3.13 a look at ``f_locals`` leaves a dictionary at the frame that
    would keep alive what the function lets go of later.

    Args:
        frame: The frame.
        names: Those that are wanted; none means all.
    """
    looked = frame.f_locals
    variables = (
        {name: looked[name] for name in names if name in looked}
        if names
        else dict(looked)
    )
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and type(looked) is dict:
        looked.clear()
    return variables
