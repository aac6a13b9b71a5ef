"""Imports this package's modules as they are written, in a run of pytest.

pytest rewrites the assertions of every module of a plugin's distribution. This package
does not need it, and to read a rewritten module takes longer than to import the module as
it is: the source is read and hashed, and the code is read from a file in small parts.

Source: ``_pytest/assertion/rewrite.py``, ``AssertionRewritingHook`` and ``_read_pyc``.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_PREFIX = f"{__package__}."


class AsWritten(MetaPathFinder):
    """A finder for this package alone; it is asked before pytest's."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Find a module of this package as Python does."""
        if not fullname.startswith(_PREFIX):
            return None
        return PathFinder.find_spec(fullname, path, target)


def stop() -> None:
    """Leave later imports to pytest's finder; may be called twice."""
    # While the interpreter ends there is no list any more.
    with suppress(ValueError, AttributeError):
        sys.meta_path.remove(_FINDER)


_FINDER: Final = AsWritten()
# The finder is added when this module is imported, because the plugin's first imports are
# most of what a run imports.
sys.meta_path.insert(0, _FINDER)
