"""Let go of what the frames of a handled exception keep alive."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
