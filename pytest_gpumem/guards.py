"""Observers that cannot harm the program they observe.

What looks at an allocation runs in the middle of the program that makes it. An error
there must not reach that program: the observer is dropped instead, and the run says so
at its end.
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

    It answers None then, and so does what it gave back to be called later.
    """

    def __init__(self, observe: Callable[..., Any]) -> None:
        self._observe: Callable[..., Any] | None = observe

    def __call__(self, *args: Any) -> Any:
        """Observe; never raises but for what interrupts the program itself."""
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
    """Return what a look at the program tells, or something else if it fails."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001  # likewise
        note_dropped(look, error)
        return otherwise


def note_dropped(observe: Callable[..., Any], error: Exception) -> None:
    """Keep, to be told at the end of the run, that an observer has failed, in words."""
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
    """Return what became of observers since the last call, and forget it."""
    found = list(_dropped)
    _dropped.clear()
    return found
