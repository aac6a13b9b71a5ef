"""Calls a function directly after a module is imported, without importing it."""

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
    """Calls a function when a top-level module is fully imported.

    If the module is already imported, ``start`` calls the function immediately. Otherwise
    it wraps the module's loader for one import. ``stop`` cancels a call that has not
    happened yet.

    Args:
        name: The module's name.
        callback: The function. It is called without arguments, in the importing thread,
            before the import statement returns.
    """

    def __init__(self, name: str, callback: Callable[[], object]) -> None:
        self._name = name
        self._callback = callback

    def start(self) -> None:
        """Wait for the import, or call the function now if the module is imported."""
        module = sys.modules.get(self._name)
        spec = getattr(module, "__spec__", None)
        if module is not None and not getattr(spec, "_initializing", False):
            self._callback()
        else:
            sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Cancel the call."""
        # While the interpreter ends there is no list any more.
        with suppress(ValueError, AttributeError):
            sys.meta_path.remove(self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find the module as Python does, and wrap its loader."""
        if fullname != self._name or self not in sys.meta_path:
            return None
        # Code that only searches for the module does not import it, so the hook stays.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._imported)
                return spec
        return None

    def _imported(self) -> None:
        if self in sys.meta_path:  # otherwise it was stopped meanwhile
            self.stop()
            self._callback()


class _Loader(importlib.abc.Loader):
    """Wraps a module's loader, and calls a function when the module is loaded."""

    def __init__(
        self, loader: importlib.abc.Loader, callback: Callable[[], object]
    ) -> None:
        self._loader = loader
        self._callback = callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, restore its own loader, then call the function."""
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._callback()

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
