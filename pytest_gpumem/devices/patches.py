"""Replaces attributes temporarily and restores them in any case."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.devices.on_import import AfterImport

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

_ABSENT: Final = object()


class PatchSet:
    """A stack of replaced attributes and entries; ``restore`` undoes the newest first.

    Limits: not thread-safe.
    """

    def __init__(self) -> None:
        # A simulated device makes about 1,000 patches, and an ExitStack takes twice the time.
        self._undoing: Final[list[tuple[Any, ...]]] = []

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Replace ``owner.name`` and return its previous value (None if there was none)."""
        saved = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        if saved is _ABSENT:
            self._undoing.append((delattr, owner, name))
            return None
        self._undoing.append((setattr, owner, name, saved))
        return saved

    def put(self, table: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of a table, and remember its previous value."""
        if key in table:
            self._undoing.append((table.__setitem__, key, table[key]))
        else:
            self._undoing.append((table.pop, key, None))
        table[key] = value

    def restore(self) -> None:
        """Restore everything, even if a part of it fails; may be called twice."""
        try:
            while self._undoing:
                function, *arguments = self._undoing.pop()
                function(*arguments)
        finally:
            if self._undoing:
                self.restore()


class LatePatches:
    """Replaces attributes of a module, also of one that is imported later.

    Args:
        module: The module's name.
        replace: Replaces the attributes, in the set of patches that it gets.
    """

    def __init__(self, module: str, replace: Callable[[PatchSet], None]) -> None:
        self._patches: Final = PatchSet()
        self._hook: Final = AfterImport(module, partial(replace, self._patches))

    def start(self) -> None:
        """Replace the attributes, now or when the module is imported."""
        self._hook.start()

    def stop(self) -> None:
        """Restore the attributes; may be called twice."""
        self._hook.stop()
        self._patches.restore()
