"""Files that live as long as the process that made them.

Note [Entries that die with their process]
An entry is a small file under ``flock``. The kernel releases this lock when the process
ends, even by SIGKILL. The next process that reads the folder finds the file unlocked and
removes it. So no process has to clean up. Process ids, which the system uses again, are
not needed. Every access takes the folder's mutex, which is also a lock on a file.
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

from pytest_gpumem.tenancy.folders import open_file, open_private

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

_SUFFIX: Final = ".entry"
_live: Final[weakref.WeakSet[LockedFile]] = weakref.WeakSet()
_mutexes: Final[weakref.WeakSet[Mutex]] = weakref.WeakSet()


class LockedFile:
    """A file of a folder that this process keeps locked until it is closed.

    Args:
        folder: Handle of its folder.
        path: The file's path.
    """

    def __init__(self, folder: int, path: Path) -> None:
        self.path: Final = path
        self._handle = open_file(path.name, folder, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        _live.add(self)

    def write(self, value: dict[str, Any]) -> None:
        """Replace the entry's value; call it under the folder's mutex."""
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
        """Only close the file, because a forked child does not own its parent's entry."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class Mutex:
    """A lock among processes and among this process's threads; nests within a thread.

    Args:
        path: The locked path, for messages.
        open_lock: Opens the lock's file.
    """

    def __init__(self, path: Path, open_lock: Callable[[], int]) -> None:
        self._path: Final = path
        self._open_lock: Final = open_lock
        self._threads = threading.RLock()
        self._depth = 0
        self._handle = -1
        _mutexes.add(self)

    @contextmanager
    def held(self, timeout_s: float | None = None) -> Iterator[None]:
        """Hold the mutex for a block.

        Raises:
            SharedFolderError: The mutex's file cannot be trusted.
            TimeoutError: Another process held the mutex for longer than ``timeout_s``.
        """
        threads = self._threads
        if not threads.acquire(timeout=-1 if timeout_s is None else timeout_s):
            raise _timeout(self._path, timeout_s)
        try:
            if not self._depth:
                self._take(timeout_s)
            self._depth += 1
            try:
                yield
            finally:
                # In a forked child the depth is already 0 (see ``_after_fork``).
                self._depth = max(self._depth - 1, 0)
                if not self._depth:
                    self._drop()
        finally:
            threads.release()

    def _take(self, timeout_s: float | None) -> None:
        handle = self._open_lock()
        self._handle = handle
        try:
            _lock(handle, timeout_s, self._path)
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def forget(self) -> None:
        """In a forked child, forget the locks that threads of its parent held."""
        self._drop()
        self._depth = 0
        self._threads = threading.RLock()


class Folder:
    """A folder of entries with one mutex, which only this user may change.

    Args:
        path: The folder; it is made if it does not exist.

    Raises:
        SharedFolderError: Another user may have put files into it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = Path(os.path.abspath(path))
        os.close(open_private(self.path))
        self._mutex: Final = Mutex(self.path, self._open_mutex)

    def mutex(self, timeout_s: float | None = None) -> AbstractContextManager[None]:
        """Hold the folder's mutex; a thread may nest such blocks of one object."""
        return self._mutex.held(timeout_s)

    def _open_mutex(self) -> int:
        with self._opened() as folder:
            return open_file(
                "mutex", folder, os.O_RDWR | os.O_CREAT, os.fspath(self.path)
            )

    @contextmanager
    def _opened(self) -> Iterator[int]:
        folder = open_private(self.path)
        try:
            yield folder
        finally:
            os.close(folder)

    def add(self, value: dict[str, Any]) -> LockedFile:
        """Make an entry of this process."""
        name = f"{os.getpid()}-{uuid.uuid4().hex}{_SUFFIX}"
        with self.mutex(), self._opened() as folder:
            entry = LockedFile(folder, self.path / name)
            entry.write(value)
        return entry

    def read(self, *, without: LockedFile | None = None) -> dict[Path, dict[str, Any]]:
        """Return every live entry, and remove the entries of dead processes.

        Args:
            without: An entry of this process that is left out.
        """
        found: dict[Path, dict[str, Any]] = {}
        left_out = "" if without is None else without.path.name
        with self.mutex(), self._opened() as folder:
            names = [
                name
                for name in os.listdir(folder)
                if name.endswith(_SUFFIX) and name != left_out
            ]
            own = {entry.path for entry in tuple(_live)} if names else ()
            for name in sorted(names):
                path = self.path / name
                handle = open_file(name, folder, os.O_RDWR)
                try:
                    if path not in own and _try_lock(handle):
                        os.unlink(name, dir_fd=folder)
                        continue
                    value = _content(handle)
                finally:
                    os.close(handle)
                if value is not None:
                    found[path] = value
        return found


def _content(handle: int) -> dict[str, Any] | None:
    """Return an entry's value; None if its process was killed before it wrote."""
    try:
        value = json.loads(os.pread(handle, os.fstat(handle).st_size, 0))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lock(handle: int, timeout_s: float | None, path: Path) -> None:
    if timeout_s is None:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return
    end = time.monotonic() + timeout_s
    while not _try_lock(handle):
        if time.monotonic() >= end:
            raise _timeout(path, timeout_s)
        time.sleep(0.01)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _timeout(path: Path, timeout_s: float | None) -> TimeoutError:
    return TimeoutError(
        f"{path} was held by another for over {timeout_s} s; give a longer timeout_s, "
        "or look for a process that hangs"
    )


def _after_fork() -> None:
    for entry in tuple(_live):
        entry.forget()
    for mutex in tuple(_mutexes):
        mutex.forget()
    _live.clear()


os.register_at_fork(after_in_child=_after_fork)
