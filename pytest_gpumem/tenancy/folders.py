"""Opens folders that processes share, and checks whether they can be trusted.

Note [When a shared folder can be trusted]
Every user may make a folder of any name in a temporary folder, and put links in it that
point elsewhere. A private folder is therefore opened without following a link. It is used
only if this user owns it and no other user may write to it. Files in it are opened
relative to its handle, so that no name is looked up twice. A folder may also be named for
several users. Other users may write to such a folder if only a file's owner can remove the
file (the sticky bit), and if the folder belongs to root or to this user.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from typing import Final

from pytest_gpumem.errors import SharedFolderError
from pytest_gpumem.inheritance import FOLDER_VARIABLE, tenancy_root

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Opening must not wait if the name is a pipe, and must not follow a link.
_FILE: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
#: How often opening is tried again, because runs that end remove empty folders.
_TRIES: Final = 100
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def open_private(path: str | os.PathLike[str]) -> int:
    """Return a handle of a private folder; it is made with mode 0700 if it does not exist.

    Args:
        path: The folder. If it is below the folder that this user's processes share,
            that folder and the folders between are checked in the same way.

    Raises:
        SharedFolderError: The path is not a folder, belongs to another user, or other
            users may write to it.
    """
    path, root = os.path.abspath(path), os.path.abspath(tenancy_root())
    is_below = path.startswith(root + os.sep)
    names = path[len(root) + 1 :].split(os.sep) if is_below else []
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            return _open_way(root if is_below else path, names)
    raise SharedFolderError(f"{path} is removed as often as it is made", path=path)


def _open_way(path: str, names: list[str]) -> int:
    handle = _open_or_make(path, path, None)
    for name in names:
        outer = handle
        path = os.path.join(path, name)
        try:
            handle = _open_or_make(name, path, outer)
        finally:
            os.close(outer)
    return handle


def open_named(path: str | os.PathLike[str]) -> int:
    """Return a handle of a folder that a user named, for one user or for several.

    If it does not exist, it is made as a private folder.

    Raises:
        SharedFolderError: The path is not a folder, or other users could replace files
            of this user.
    """
    path = os.path.abspath(path)
    try:
        handle = os.open(path, _FOLDER)
    except FileNotFoundError:
        return open_private(path)
    except OSError as error:
        raise _no_folder(path, error, path, None) from None
    found = os.fstat(handle)
    wrong = None
    if found.st_uid not in (0, os.geteuid()):
        wrong = f"belongs to user {found.st_uid}, neither to root nor to this user"
    elif found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
        wrong = "may be written to by others and lacks the sticky bit"
    if wrong:
        os.close(handle)
        raise SharedFolderError(
            f"{path} {wrong}, so its locks could be replaced; let root make it: "
            f"install -d -m 1777 {path}",
            path=path,
        )
    return handle


def open_file(name: str, folder: int, flags: int, path: str = "") -> int:
    """Return a handle of a regular file in an open folder; a new file has mode 0600.

    Args:
        name: The file's name in the folder.
        folder: Handle of the folder.
        flags: As for ``os.open``.
        path: The folder's path, for the error.

    Raises:
        FileNotFoundError: There is no such file, and the flags do not ask for a new one.
        SharedFolderError: It is not a regular file, but a link or a pipe, for example.
    """
    try:
        handle = os.open(name, flags | _FILE, 0o600, dir_fd=folder)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    except FileNotFoundError:
        raise
    except PermissionError:
        raise SharedFolderError(
            f"{os.path.join(path, name)} is not open to this user; let its owner "
            "remove it",
            path=os.path.join(path, name),
        ) from None
    except OSError:  # for example a link or a socket
        pass
    raise SharedFolderError(
        f"{os.path.join(path, name)} is not a regular file, as a lock is; remove it",
        path=os.path.join(path, name),
    )


def open_lock(name: str, folder: int, path: str) -> int:
    """Return a handle of a lock file; a new file gets the permissions of the folder.

    Args:
        name: The file's name in the folder.
        folder: Handle of the folder.
        path: The folder's path, for the error.

    Raises:
        SharedFolderError: The file cannot be a lock of this user.
    """
    # An existing file is opened without O_CREAT. In a folder open to all, Linux refuses
    # O_CREAT for the file of another user.
    # Source: Linux, Documentation/admin-guide/sysctl/fs.rst, "protected_regular".
    with suppress(FileNotFoundError):
        return open_file(name, folder, os.O_RDONLY, path)
    _make_lock(name, folder, path)
    return open_file(name, folder, os.O_RDONLY, path)


def _make_lock(name: str, folder: int, path: str) -> None:
    """Make a lock file that has its final mode before others can see it."""
    there = os.fstat(folder)
    fresh = f".{name[:100]}.{secrets.token_hex(8)}"
    try:
        handle = open_file(fresh, folder, os.O_RDWR | os.O_CREAT | os.O_EXCL, path)
    except SharedFolderError:
        raise SharedFolderError(
            f"{path} has no lock {name!r} and lets this user make none; ask its owner "
            "for the right to write to it",
            path=path,
        ) from None
    try:
        if there.st_mode & _OTHERS_WRITE:
            with suppress(OSError):  # this user may not be in the folder's group
                os.fchown(handle, -1, there.st_gid)
            os.fchmod(handle, 0o600 | (there.st_mode & 0o066))
        with suppress(FileExistsError):
            os.link(fresh, name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.unlink(fresh, dir_fd=folder)
        os.close(handle)


def _open_or_make(name: str, path: str, outer: int | None) -> int:
    """Return a handle of one private folder; make the folder if it does not exist."""
    try:
        handle = _open_or_make_any(name, path, outer)
    except FileNotFoundError:
        raise  # another process removed the outer folder, which was empty
    except OSError as error:
        raise _no_folder(path, error, name, outer) from None
    found = os.fstat(handle)
    wrong = None
    if found.st_uid != os.geteuid():
        wrong = f"belongs to user {found.st_uid}, not to this user ({os.geteuid()})"
    elif found.st_mode & _OTHERS_WRITE:
        wrong = f"may be written to by others (mode {stat.S_IMODE(found.st_mode):o})"
    if wrong:
        os.close(handle)
        raise SharedFolderError(f"{path} {wrong}; {_ADVICE}", path=path)
    return handle


def _open_or_make_any(name: str, path: str, outer: int | None) -> int:
    with suppress(FileNotFoundError):
        return os.open(name, _FOLDER, dir_fd=outer)
    if outer is None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=outer)
    return os.open(name, _FOLDER, dir_fd=outer)


def _no_folder(
    path: str, error: OSError, name: str, outer: int | None
) -> SharedFolderError:
    wrong = f"cannot be opened ({error.strerror})"
    with suppress(OSError):
        mode = os.stat(name, dir_fd=outer, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            wrong = "is a symbolic link, which is not followed"
        elif not stat.S_ISDIR(mode):
            wrong = "is not a folder"
    return SharedFolderError(f"{path} {wrong}; {_ADVICE}", path=path)


_ADVICE: Final = (
    f"remove it, or name a folder of your own with the variable {FOLDER_VARIABLE}"
)
