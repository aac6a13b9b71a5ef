"""Attributes replaced for a while, and put back whatever happens."""

from __future__ import annotations

from typing import Any, Final

_ABSENT: Final = object()


class PatchSet:
    """A stack of replaced attributes; ``restore`` undoes them, last first.

    Limits: not thread-safe.
    """

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Replace ``owner.name`` and return what stood there (None if nothing)."""
        saved = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        self._saved.append((owner, name, saved))
        return None if saved is _ABSENT else saved

    def restore(self) -> None:
        """Put every attribute back; those that were not there are taken away."""
        while self._saved:
            owner, name, saved = self._saved.pop()
            if saved is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, saved)
