"""Files that live as long as the process that made them.

Note [Entries that die with their process]
An entry is a small file under ``flock``. The kernel drops that lock when the process
ends, also by SIGKILL: whoever next reads the folder finds the file unlocked and removes
it. Nobody has to clean up, and no process id is trusted, as ids are used again.
All of it happens under one mutex for each folder, which is such a lock itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import uuid
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Threads of one process share the mutex's file lock, so they need one of their own.
_threads: Final = threading.RLock()
_live: Final[weakref.WeakSet[Entry]] = weakref.WeakSet()


class Entry:
    """One file of a folder, ours until it is closed or this process ends."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        _live.add(self)

    def write(self, value: dict[str, Any]) -> None:
        """Replace what the entry says; call it under the folder's mutex."""
        data = json.dumps(value).encode()
        os.pwrite(self._handle, data, 0)
        os.ftruncate(self._handle, len(data))

    def close(self) -> None:
        """Remove the entry; safe to call twice."""
        if self._handle >= 0:
            with suppress(FileNotFoundError):
                self.path.unlink()
            self.forget()

    def forget(self) -> None:
        """Close the file only: a forked child does not hold what its parent holds."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class Folder:
    """A folder of entries with one mutex.

    Args:
        path: The folder; it is made if need be.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._depth = 0

    @contextmanager
    def mutex(self, timeout_s: float | None = None) -> Iterator[None]:
        """Hold the folder's mutex; nests within a thread.

        Raises:
            TimeoutError: Another process held it for longer than ``timeout_s``.
        """
        with _threads:
            if self._depth:
                yield
                return
            handle = os.open(self.path / "mutex", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _lock(handle, timeout_s, self.path)
                self._depth = 1
                yield
            finally:
                self._depth = 0
                os.close(handle)

    def add(self, value: dict[str, Any]) -> Entry:
        """Make an entry of this process."""
        with self.mutex():
            entry = Entry(self.path / f"{os.getpid()}-{uuid.uuid4().hex}.entry")
            entry.write(value)
        return entry

    def read(self) -> dict[Path, dict[str, Any]]:
        """Return every live entry; those of dead processes are removed."""
        found: dict[Path, dict[str, Any]] = {}
        with self.mutex():
            own = {entry.path for entry in tuple(_live)}
            for path in sorted(self.path.glob("*.entry")):
                if path not in own and _is_dead(path):
                    path.unlink()
                    continue
                with suppress(ValueError):  # killed between opening and writing
                    found[path] = json.loads(path.read_text(encoding="utf-8"))
        return found


def _is_dead(path: Path) -> bool:
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def _lock(handle: int, timeout_s: float | None, path: Path) -> None:
    if timeout_s is None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    end = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise TimeoutError(
                    f"{path} was held by another process for over {timeout_s} s; give "
                    "a longer timeout_s, or look for a process that hangs"
                ) from None
            time.sleep(0.01)
        else:
            return


def _after_fork() -> None:
    global _threads  # noqa: PLW0603  # another thread may have held it
    _threads = threading.RLock()  # type: ignore[misc]  # only here
    for entry in tuple(_live):
        entry.forget()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
