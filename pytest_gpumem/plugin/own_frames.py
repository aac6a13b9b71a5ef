"""Lets the traceback of a failed test end at the line that called the simulated card.

A card's error comes from C++, so on a card the last frame is that of the caller. pytest
leaves out a frame with ``__tracebackhide__`` among its local or its global names.
``--full-trace`` and ``--tb=native`` show all frames.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Final

from pytest_gpumem.stacks import errors_behind

if TYPE_CHECKING:
    import pytest

#: The packages that simulate a card or make an allocation fail.
_PACKAGES: Final = (
    "pytest_gpumem.allocator",
    "pytest_gpumem.devices",
    "pytest_gpumem.instruments.injector",
)
#: Errors that show a mistake in these packages, because a card never raises them.
_MISTAKES: Final = (AssertionError, AttributeError, KeyError, NameError)


def hide(error: BaseException) -> None:
    """Mark the modules of this package in the traceback of an error, and of its causes."""
    for each in errors_behind(error):
        for frame, _line in traceback.walk_tb(each.__traceback__):
            names = frame.f_globals
            if str(names.get("__name__")).startswith(_PACKAGES):
                names["__tracebackhide__"] = _is_hidden


def _is_hidden(raised: pytest.ExceptionInfo[BaseException] | None) -> bool:
    return raised is None or not isinstance(raised.value, _MISTAKES)
