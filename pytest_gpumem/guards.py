"""Keeps errors of observers away from the program that they observe.

An observer of allocations is called while the program allocates. If it raises, the error
must not reach the program. Instead the observer is dropped, and a message at the end of
the run says so.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

#: The messages about observers that were dropped, each once.
_dropped: Final[dict[str, None]] = {}


class Guarded:
    """An observer that is dropped once it has raised.

    After that a call returns None, also of functions that the observer returned before.
    """

    def __init__(self, observe: Callable[..., Any]) -> None:
        self._observe: Callable[..., Any] | None = observe

    def __call__(self, *args: Any) -> Any:
        """Call the observer; only errors that end the program, such as an interrupt, pass."""
        if self._observe is None:
            return None
        try:
            found = self._observe(*args)
        except Exception as error:  # noqa: BLE001  # no error may reach the program
            note_dropped(self._observe, error)
            self._observe = None
            return None
        return Guarded(found) if callable(found) else found


def guarded(look: Callable[[], _T], *, otherwise: _T) -> _T:
    """Return the result of a function that observes the program; a default if it raises."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  # no error may reach the program
        note_dropped(look, error)
        return otherwise


def note_dropped(observe: Callable[..., Any], error: Exception) -> None:
    """Note that an observer has raised, for the message at the end of the run."""
    name = getattr(observe, "__qualname__", type(observe).__qualname__)
    home = getattr(observe, "__module__", "")
    last = traceback.extract_tb(error.__traceback__)[-1]
    try:
        text = f"{error}"
    except Exception:  # noqa: BLE001  # code of the program's own class may raise
        text = "its text cannot be read"
    words = f"{type(error).__name__}: {text:.200}"
    _dropped[
        f"{home}.{name} was stopped, so its record is incomplete: "
        f"{words} ({last.name}, line {last.lineno})"
    ] = None


def take_dropped() -> list[str]:
    """Return and forget the failures of observers since the last call."""
    found = list(_dropped)
    _dropped.clear()
    return found
