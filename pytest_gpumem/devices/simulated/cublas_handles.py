"""Which cuBLAS handle a host thread uses: a card's handles are used again.

A handle's workspaces stay with it, so the number of handles decides how much memory they
hold.

Source: ``aten/src/ATen/cuda/detail/DeviceThreadHandles.h``: a thread that needs a handle
takes the one that was released last, or makes one, and releases it when the thread ends.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from typing import Final

#: The handle of autograd's thread, which never ends.
AUTOGRAD: Final = -1


class CublasHandles:
    """The cuBLAS handles of one card."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._of_threads: dict[int, int] = {}
        self._released: list[int] = []

    def of_thread(self) -> int:
        """Return the number of the handle of the calling thread."""
        number = self._of_threads.get(threading.get_ident())
        return self._reserve() if number is None else number

    def _reserve(self) -> int:
        thread = threading.get_ident()
        try:
            number = self._released.pop()
        except IndexError:
            number = next(self._numbers)
        self._of_threads[thread] = number
        try:
            reserved = _thread.reserved
        except AttributeError:
            reserved = _thread.reserved = _Reserved()
        reserved.cards.append((weakref.ref(self), thread))
        return number

    def release(self, thread: int) -> None:
        """Let another thread use the handle of a thread that ends."""
        self._released.append(self._of_threads.pop(thread))


class _Reserved:
    """A thread's handles on all cards, released with the thread's other local values."""

    def __init__(self) -> None:
        self.cards: list[tuple[weakref.ref[CublasHandles], int]] = []

    def __del__(self) -> None:
        for reference, thread in self.cards:
            handles = reference()
            if handles is not None:
                handles.release(thread)


_thread: Final = threading.local()
