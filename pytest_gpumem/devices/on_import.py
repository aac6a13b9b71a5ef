"""Do something right after a module is imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class AfterImport(importlib.abc.MetaPathFinder):
    """Call a function once a top-level module is fully imported.

    ``start`` calls at once if it already is; otherwise the module's own loader is
    wrapped for its one run. ``stop`` withdraws a call that has not happened.

    Args:
        name: The module's name.
        callback: Called without arguments, in the importing thread, before the
            import statement returns.
    """

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self._name = name
        self._callback = callback

    def start(self) -> None:
        """Wait for the import, or call now if it has happened."""
        module = sys.modules.get(self._name)
        spec = getattr(module, "__spec__", None)
        if module is not None and not getattr(spec, "_initializing", False):
            self._callback()
        else:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Wait no longer."""
        with suppress(ValueError):
            sys.meta_path.remove(self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find the module as Python would, with its loader wrapped."""
        if fullname != self._name or self not in sys.meta_path:
            return None
        # Whoever only looks for the module does not import it: the hook stays.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._imported)
                return spec
        return None

    def _imported(self) -> None:
        if self in sys.meta_path:  # else it was stopped meanwhile
            self.stop()
            self._callback()


class _Loader(importlib.abc.Loader):
    """A module's loader that calls back when it is done."""

    def __init__(
        self, loader: importlib.abc.Loader, callback: Callable[[], None]
    ) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, hand it back to its own loader, then call back."""
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._callback()

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
