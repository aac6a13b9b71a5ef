"""Let go of what captured log records keep alive."""

from __future__ import annotations

import logging

from pytest_gpumem.instruments.frames import clear_exception


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
