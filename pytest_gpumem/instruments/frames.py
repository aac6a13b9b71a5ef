"""Let go of what the frames of a handled exception keep alive."""

from __future__ import annotations

import builtins
from typing import Final

from pytest_gpumem.stacks import clear_frame

#: Groups of exceptions; there are none before Python 3.11.
_GROUP: Final = getattr(builtins, "BaseExceptionGroup", ())


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
        if issubclass(type(current), _GROUP):
            waiting += current.exceptions  # type: ignore[attr-defined]  # a group has them
