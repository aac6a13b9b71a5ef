"""Take away what Python has not on Windows, before anything else is imported.

Source: the pages of ``os``, ``signal``, ``fcntl``, ``mmap`` of Python's documentation,
"Availability"; ``os.kill`` there ends a process or sends it Ctrl-C; Windows renames and
removes no file that is open or mapped, and makes symbolic links for administrators only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from typing import Any

for module in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[module] = None  # type: ignore[assignment]  # as if it were not there
for name in (
    *("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"),
    "fchmod",
):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGALRM", "pthread_kill", "setitimer", "alarm"):
    delattr(signal, name)

_mapped: dict[str, mmap.mmap] = {}
_kill, _rename = os.kill, os.rename


class _Map(mmap.mmap):
    """A map that knows its file."""

    def __new__(cls, handle: int, *args: Any, **kwargs: Any) -> _Map:  # noqa: PYI034  # Self needs Python 3.11
        made: _Map = super().__new__(cls, handle, *args, **kwargs)
        if handle >= 0:
            _mapped[os.path.realpath(f"/proc/self/fd/{handle}")] = made
        return made


def _kill_there(pid: int, number: int) -> None:
    ours = (
        "pytest_gpumem" in sys._getframe(1).f_code.co_filename
    )  # others know where they are
    assert number or not ours, "signal 0 ends a process on Windows"
    _kill(pid, number)


def _rename_there(old: object, new: object, **kwargs: object) -> None:
    path = os.path.realpath(os.fspath(old))  # type: ignore[call-overload]
    if path in _mapped and not _mapped[path].closed:
        raise PermissionError(13, "The file is mapped", path)
    _rename(old, new, **kwargs)  # type: ignore[arg-type]


def _no_link(*_args: object, **_kwargs: object) -> None:
    raise OSError(1314, "A required privilege is not held by the client")


class _Library(ctypes.CDLL):
    """A library by its name: None is not a name there."""

    def __init__(self, name: str | None, *args: Any, **kwargs: Any) -> None:
        if name is None:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        super().__init__(name, *args, **kwargs)


mmap.mmap = _Map  # type: ignore[misc, assignment]
os.kill = _kill_there
os.rename = _rename_there  # type: ignore[assignment]
os.symlink = _no_link
ctypes.CDLL = _Library  # type: ignore[misc]
