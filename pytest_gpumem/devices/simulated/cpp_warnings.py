"""Reports warnings of C++ at the line of user code that caused them.

C++ reports the innermost Python frame. This is a frame of this package if the package
makes the call. Recording warnings takes microseconds, so only calls that are known to
warn use this module.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final, TypeVar

import torch

from pytest_gpumem.stacks import calling_frame, frames_from

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")
_OWN: Final = "pytest_gpumem."
_given: Final[set[str]] = set()


def relayed(call: Callable[[], _T], depth: int = 0) -> _T:
    """Call a function, and report its warnings at the line of the caller's caller.

    Args:
        call: The function to call.
        depth: Additional frames of this package between that line and this function.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    for each in caught:
        warnings.warn(each.message, each.category, stacklevel=3 + depth)
    return result


def warn(text: str, *, once: bool = False) -> None:
    """Warn at the innermost line that is not of this package, as C++ does.

    Args:
        text: The warning.
        once: Whether a process gives this warning only once, unless it has asked for all
            of them: ``TORCH_WARN_ONCE``.
    """
    if once and text in _given and not torch.is_warn_always_enabled():
        return
    _given.add(text)
    frame = next(
        each
        for each in frames_from(calling_frame())
        if not each.f_globals.get("__name__", "").startswith(_OWN)
    )
    warnings.warn_explicit(
        text,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
