"""Warnings of C++, given at the line of the user's that they are about.

C++ warns of the innermost Python frame, which is this package's where it stands in
between. Recording warnings costs microseconds: only what is known to warn is led here.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


def relayed(call: Callable[[], _T], depth: int = 0) -> _T:
    """Call a function; give its warnings as those of the caller's caller.

    Args:
        call: What to do.
        depth: Frames of this package between that caller and the one of this function.
    """
    __tracebackhide__ = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    for each in caught:
        warnings.warn(each.message, each.category, stacklevel=3 + depth)
    return result
