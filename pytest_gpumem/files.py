"""Writes files completely or not at all, and locks them."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import time
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: Whether the system has POSIX's locks, signals and owners of files; Windows does not.
IS_POSIX: Final = find_spec("fcntl") is not None
#: The seconds that ``locked`` waits for another process, and between two attempts.
LOCK_WAIT_S: Final = 60.0
LOCK_LOOK_S: Final = 0.02
#: The errors of a file system without locks.
_NO_LOCKS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})


def write_atomically(path: str | os.PathLike[str], text: str | Iterable[str]) -> None:
    """Write a text file so that a reader finds the old text or all of the new text.

    Missing folders are made. A replaced file keeps its permissions and owner. A symbolic
    link stays a link: the file that it names is replaced. A file that is not regular
    (``/dev/stdout``, a pipe) cannot be replaced; the text is written to it. Names in
    another encoding may contain characters that UTF-8 does not have (lone surrogates).
    They are written as escapes, which JSON reads as the same characters.

    Args:
        path: The file.
        text: Its text, or the text's pieces.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    pieces = (text,) if isinstance(text, str) else text
    _write(path, (each.encode("utf-8", "backslashreplace") for each in pieces))


def write_bytes_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file as ``write_atomically`` does.

    Raises:
        OSError: It cannot be written; the old file is untouched.
    """
    _write(path, (content,))


def is_special(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path leads to a device, a pipe or a socket."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116  # the path may be text or a Path
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def why_not_writable(path: Path) -> str | None:
    """Return why a file could not be written by ``write_atomically``; None if it could.

    Nothing is made or changed.

    Args:
        path: The file; it need not exist.
    """
    try:
        folder = Path(os.path.realpath(path)).parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        problems = {
            "it is a folder; name a file in it": path.is_dir(),
            "the file is read-only": path.exists() and not os.access(path, os.W_OK),
            f"{folder} is not a folder": not folder.is_dir(),
            f"the folder {folder} may not be written to": not is_special(path)
            and not os.access(folder, os.W_OK | os.X_OK),
        }
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        return str(error)
    return next((problem for problem, holds in problems.items() if holds), None)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a file against other callers of this function, to read, change and write it.

    The lock is a hidden file beside the file (for a symbolic link, beside its target). It
    is removed afterwards. On a file system without locks there is none.

    Args:
        path: The file; it need not exist.

    Raises:
        OSError: The lock cannot be made, or another process keeps it for a minute.
    """
    target = Path(os.path.realpath(path))
    if is_special(target):
        yield
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name[:100]}.lock")
    if not IS_POSIX:
        from filelock import FileLock

        with FileLock(lock, timeout=LOCK_WAIT_S):
            yield
        return
    import fcntl

    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    end_s = time.monotonic() + LOCK_WAIT_S
    while True:
        handle = os.open(lock, flags, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in _NO_LOCKS:
                yield
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                raise
            if time.monotonic() > end_s:
                raise TimeoutError(
                    f"another process keeps {lock} locked for {LOCK_WAIT_S:.0f} s"
                ) from None
            time.sleep(LOCK_LOOK_S)
            continue
        # The previous holder removes the lock file. A lock on a removed file protects
        # nothing.
        if _is_same(lock, handle):
            break
        os.close(handle)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(handle)


def _is_same(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _write(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    if is_special(path):
        with open(path, "wb") as file:  # noqa: PTH123  # the path may be text or a Path
            file.writelines(pieces)
        return
    # A rename would replace the link itself. The file that the link names is replaced.
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        prefix=f".{target.name[:100]}.", suffix=".tmp", dir=target.parent
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        _take_rights(Path(temporary), target)
        Path(temporary).replace(target)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise


def _take_rights(temporary: Path, target: Path) -> None:
    """Give a file the permissions of the one that it replaces, or those of any new file.

    The process's umask can only be read by changing it for all threads, so it is taken
    from the permissions of a new file.
    """
    try:
        before = target.stat()
    except FileNotFoundError:
        sample = temporary.with_suffix(".new")
        os.close(os.open(sample, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            mode = sample.stat().st_mode
        finally:
            sample.unlink()
    else:
        mode = before.st_mode
        if hasattr(os, "chown"):
            # Root, as in a container, would become the owner of another user's file.
            with suppress(OSError):
                os.chown(temporary, before.st_uid, before.st_gid)
    temporary.chmod(stat.S_IMODE(mode))
