"""Observers that cannot harm the program they observe.

An observer of allocations runs in the middle of the program that allocates. An error of
the observer must not reach that program: the observer is dropped instead, and the run
says so at its end.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

#: What became of observers that were dropped, in words, each once.
_dropped: Final[dict[str, None]] = {}


class Guarded:
    """An observer that is dropped once it has raised.

    From then on it returns None, and so do the functions that it returned before.
    """

    def __init__(self, observe: Callable[..., Any]) -> None:
        self._observe: Callable[..., Any] | None = observe

    def __call__(self, *args: Any) -> Any:
        """Call the observer; raises only errors that interrupt the program itself."""
        if self._observe is None:
            return None
        try:
            found = self._observe(*args)
        except Exception as error:  # noqa: BLE001  # whatever it is, the program goes on
            note_dropped(self._observe, error)
            self._observe = None
            return None
        return Guarded(found) if callable(found) else found


def guarded(look: Callable[[], _T], *, otherwise: _T) -> _T:
    """Return the result of a function that observes the program; a default if it fails."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  # likewise
        note_dropped(look, error)
        return otherwise


def note_dropped(observe: Callable[..., Any], error: Exception) -> None:
    """Note that an observer has failed, for the end of the run."""
    name = getattr(observe, "__qualname__", type(observe).__qualname__)
    home = getattr(observe, "__module__", "")
    last = traceback.extract_tb(error.__traceback__)[-1]
    try:
        text = f"{error}"
    except Exception:  # noqa: BLE001  # the program's own class
        text = "its text cannot be had"
    words = f"{type(error).__name__}: {text:.200}"
    _dropped[
        f"{home}.{name} was dropped, what it records is not whole: "
        f"{words} ({last.name}, line {last.lineno})"
    ] = None


def take_dropped() -> list[str]:
    """Return and forget the failures of observers since the last call."""
    found = list(_dropped)
    _dropped.clear()
    return found
