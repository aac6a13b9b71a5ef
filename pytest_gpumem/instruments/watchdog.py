"""Interrupts a run that takes too long, and keeps the stack of every thread."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.stacks import frames_from

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import FrameType

#: Seconds between attempts. Code that catches every error is interrupted again and again,
#: after some attempts so often that one error reaches it outside its ``try`` block.
_AGAIN_S: Final = 0.5
_OFTEN_S: Final = 0.001
_PATIENCE: Final = 2
_FRAMES: Final = 12
#: Bytes with room for a ``struct sigaction`` on every system; on Linux it has 152.
_ACTION: Final = 1024
_OURS: Final = str(Path(__file__).parent)


class HangError(BaseException):
    """A run took too long; not an ``Exception``, so that fallbacks do not catch it."""


class _LostErrors:
    """Handles errors that Python cannot raise: those of finalisers and weak references.

    A watchdog's error may occur there. It is then dropped without a message, because the
    watchdog raises it again; any other error goes to the hook that was installed before.
    While this hook runs, the watchdog does not interrupt it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._previous: Any = None

    @contextlib.contextmanager
    def ours_dropped(self) -> Generator[None]:
        """Drop watchdogs' errors during a block; several threads may be in such a block."""
        with self._lock:
            if self._num_users == 0:
                self._previous, sys.unraisablehook = sys.unraisablehook, self._on_lost
            self._num_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_users -= 1
                if self._num_users == 0 and sys.unraisablehook == self._on_lost:
                    sys.unraisablehook = self._previous

    def _on_lost(self, lost: Any) -> None:
        if not issubclass(lost.exc_type, HangError):
            self._previous(lost)

    def runs_in(self, frame: FrameType | None) -> bool:
        """Tell whether the hook is among a frame and its callers."""
        code = _LostErrors._on_lost.__code__
        return any(each.f_code is code for each in frames_from(frame))


_LOST: Final = _LostErrors()


class Watchdog:
    """Interrupt the calling thread once a block has lasted too long.

    In the main thread a signal interrupts the block, even while it waits for a lock or a
    queue. In another thread, and on systems without signals to threads, the error is
    raised between two bytecodes.

    Args:
        timeout_s: Seconds until the block is interrupted; None means never.

    Attributes:
        stacks: Every thread's stack at the end of the time, as text; None before.

    Limits: in a C function other than a lock, a sleep or a system call, the code is
    interrupted only once the function returns. Before Python 3.11, a loop of nothing but
    ``try`` that catches ``BaseException`` never ends: Python handles no signal before
    ``SETUP_FINALLY``, so that no moment is outside of ``try`` (``Python/ceval.c``, 3.10).
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._target = 0
        self._uses_signal = False
        self._handler: Any = None
        self._action: Any = None
        self._lost = contextlib.ExitStack()
        self.stacks: str | None = None

    def __enter__(self) -> Watchdog:  # noqa: PYI034  # Self needs Python 3.11
        if self._timeout_s is None:
            return self
        self._target = threading.get_ident()
        self._lost.enter_context(_LOST.ours_dropped())
        in_main = threading.current_thread() is threading.main_thread()
        self._uses_signal = in_main and hasattr(signal, "pthread_kill")
        if self._uses_signal:
            self._action = ctypes.create_string_buffer(_ACTION)
            _sigaction(signal.SIGUSR2, None, self._action)
            self._handler = signal.signal(signal.SIGUSR2, self._interrupt)
        self._thread = threading.Thread(
            target=self._watch, name="gpumem watchdog", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._thread is None:
            return
        while True:
            try:
                self._done.set()
                self._thread.join()
                break
            except HangError:
                continue  # the watchdog raised again while the block ended
        if self._uses_signal:
            signal.signal(signal.SIGUSR2, self._handler)
            _sigaction(signal.SIGUSR2, self._action, None)
        self._lost.close()

    def _watch(self) -> None:
        if self._done.wait(self._timeout_s):
            return
        self.stacks = _stacks_of_others()
        for attempt in itertools.count():
            if self._done.is_set():
                return
            if self._uses_signal:
                signal.pthread_kill(self._target, signal.SIGUSR2)
            else:
                raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                raise_in(ctypes.c_ulong(self._target), ctypes.py_object(HangError))
            is_deaf = self._uses_signal and attempt >= _PATIENCE
            self._done.wait(_OFTEN_S if is_deaf else _AGAIN_S)

    def _interrupt(self, _number: int, frame: FrameType | None) -> None:
        ends = any(
            each.f_code is Watchdog.__exit__.__code__ for each in frames_from(frame)
        )
        if not ends and not _LOST.runs_in(frame):
            raise HangError(f"no end after {self._timeout_s:g} s")


def _sigaction(number: int, new: Any, old: Any) -> None:
    """Set or read the system's action on a signal.

    Python's ``signal`` module does not see handlers that faulthandler has installed.
    """
    ctypes.CDLL(None).sigaction(ctypes.c_int(number), new, old)


def _stacks_of_others() -> str:
    """Return the innermost frames of every Python thread but this one."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():  # noqa: SLF001  # the documented way to see other threads
        if ident != threading.get_ident():
            whole = traceback.extract_stack(frame)
            stack = [each for each in whole if not each.filename.startswith(_OURS)]
            text = "".join(traceback.format_list(stack[-_FRAMES:]))
            parts.append(f"thread {names.get(ident, ident)}:\n{text}")
    return "\n".join(parts)
