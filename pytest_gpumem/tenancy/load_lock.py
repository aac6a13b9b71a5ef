"""Allows one load at a time on each card, in tests and in production."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_gpumem.files import IS_POSIX
from pytest_gpumem.inheritance import LOCKS_VARIABLE, tenancy_root
from pytest_gpumem.visibility import VISIBLE_VARIABLE

if IS_POSIX:
    from pytest_gpumem.tenancy.entries import Mutex
    from pytest_gpumem.tenancy.folders import open_lock, open_named, open_private

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def gpu_load_lock(
    device: int | str = 0,
    *,
    timeout_s: float | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[None]:
    """Hold a card's load lock: no other process of this user holds it at the same time.

    A load needs more memory than the loaded model, so two models may fit on a card while
    two loads at the same time do not. The lock is released when its process ends. Like
    `threading.RLock`, it may be taken again by the thread that holds it.

    Args:
        device: The card: an index as CUDA counts it, or any name that the processes
            agree on, such as a UUID.
        timeout_s: The longest wait in seconds; None means no limit.
        folder: The folder that the processes share. The default is the folder in the
            environment variable ``PYTEST_GPUMEM_LOCKS``, which several users may share
            (root makes it: ``install -d -m 1777``). Without this variable it is the folder
            in ``PYTEST_GPUMEM_TENANCY``, and without both a folder in the temporary
            folder; the last two are private to this user.

    Raises:
        SharedFolderError: Another user could change the folder or the lock.
        TimeoutError: The wait was longer than ``timeout_s``.
    """
    card = physical_card(device) if isinstance(device, int) else device
    named = folder if folder is not None else os.environ.get(LOCKS_VARIABLE)
    root = os.path.abspath(named or tenancy_root())  # noqa: PTH100  # no link is resolved
    name = f"{card.replace('/', '_')}.lock"
    lock = _mutex if IS_POSIX else _library_lock
    with lock(root, name, bool(named)).held(timeout_s):
        yield


class _LibraryLock:
    """The lock on systems without ``flock``, such as Windows.

    Limits: on these systems the owner of a folder is not checked. The default folder is in
    the temporary folder, which belongs to the user.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self._lock: Final = FileLock(path)  # each thread has its own, which can nest

    @contextmanager
    def held(self, timeout_s: float | None = None) -> Iterator[None]:
        from filelock import Timeout

        try:
            self._lock.acquire(timeout=-1 if timeout_s is None else timeout_s)
        except Timeout:
            raise TimeoutError(
                f"{self._lock.lock_file} was held by another for over {timeout_s} s; "
                "give a longer timeout_s, or look for a process that hangs"
            ) from None
        try:
            yield
        finally:
            self._lock.release()


@cache
def _library_lock(folder: str, name: str, _is_named: bool) -> _LibraryLock:  # noqa: FBT001  # the arguments are the cache's key
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    return _LibraryLock(Path(folder, name))


@cache
def _mutex(folder: str, name: str, is_named: bool) -> Mutex:  # noqa: FBT001  # the arguments are the cache's key
    """Return the lock object of a name; there is one in this process, so it can nest."""

    def opened() -> int:
        # Opened each time, because the system may empty temporary folders meanwhile.
        handle = open_named(folder) if is_named else open_private(folder)
        try:
            return open_lock(name, handle, folder)
        finally:
            os.close(handle)

    return Mutex(Path(folder, name), opened)


def physical_card(index: int) -> str:
    """Return a card's entry in ``CUDA_VISIBLE_DEVICES``: an index, a UUID, a MIG name.

    Raises:
        ValueError: The variable shows no such card.
    """
    visible = os.environ.get(VISIBLE_VARIABLE)
    if visible is None:
        return str(index)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if not 0 <= index < len(names):
        raise ValueError(
            f"device={index}: CUDA_VISIBLE_DEVICES={visible!r} shows {len(names)} card(s)"
        )
    return names[index]
