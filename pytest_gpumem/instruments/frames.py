"""Let go of what handled exceptions keep alive by their frames, in log records too."""

from __future__ import annotations

import builtins
import logging
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


def release_log_records() -> None:
    """Clear the frames of the exceptions in records that a handler has kept.

    pytest's log capture keeps every record until the test's teardown, and with
    ``logger.exception`` the frames of the error, and with those their tensors. The
    records' texts stay.
    """
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            for record in _kept(handler):
                if record.exc_info and record.exc_info[1] is not None:
                    clear_exception(record.exc_info[1])


def _kept(handler: logging.Handler) -> list[logging.LogRecord]:
    records = getattr(handler, "records", None) or getattr(handler, "buffer", None)
    if not isinstance(records, list):
        return []
    return [each for each in records if isinstance(each, logging.LogRecord)]
