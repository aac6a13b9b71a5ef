"""Reports warnings of C++ at the line of user code that caused them.

C++ reports the innermost Python frame. This is a frame of this package if the package
makes the call. Recording warnings takes microseconds, so only calls that are known to
warn use this module.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


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
