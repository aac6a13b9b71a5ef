"""Keeps checkpoints in a cache, and builds each completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock, Timeout

from pytest_gpumem.errors import CheckpointError
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

#: The file with the request of a checkpoint, and the sizes and digests of its files.
MANIFEST: Final = "pytest_gpumem.json"
#: The bytes that are read from each end of a file, to recognise a changed file.
_SAMPLE: Final = 2**20
_CHUNK: Final = 2**23
#: Seconds to wait for another process that builds the same checkpoint.
_PATIENCE_S: Final = 1800.0
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SUFFIX: Final = ".building"
_log: Final = logging.getLogger(__name__)


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache: the given folder, ``PYTEST_GPUMEM_CACHE``, or the user's cache."""
    if given is not None:
        return Path(given)
    named = os.environ.get("PYTEST_GPUMEM_CACHE")
    if named:
        return Path(named)
    import platformdirs

    return Path(platformdirs.user_cache_path("pytest-gpumem")) / "checkpoints"


def digest_of(request: Mapping[str, Any]) -> str:
    """Return a digest of a checkpoint's request."""
    text = json.dumps(request, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def find_damage(
    folder: Path,
    request: Mapping[str, Any] | None = None,
    *,
    check_all: bool = False,
) -> str | None:
    """Return the damage of a checkpoint that was built here, in words; None without damage.

    Args:
        folder: The checkpoint.
        request: The request that it must have been built from; None means any request.
        check_all: Whether to compare every byte, not only sizes and both ends of each
            file.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if request is not None and manifest["request"] != digest_of(request):
            return "it was built from another request"
        for name, written in dict(manifest["files"]).items():
            damage = _damage_of(folder / name, written, check_all=check_all)
            if damage is not None:
                return damage
    except OSError as error:
        missing = Path(error.filename or folder).name
        return f"{missing} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is not as it was written"
    return None


def _damage_of(
    file: Path, written: Mapping[str, Any], *, check_all: bool
) -> str | None:
    size = file.stat().st_size
    if size != written["bytes"]:
        return f"{file.name} has {size} bytes instead of {written['bytes']}"
    if _sample(file) != written["sample"]:
        return f"{file.name} is not as it was written"
    if check_all and _digest(file) != written["sha256"]:
        return f"{file.name} is not as it was written"
    return None


def is_intact(
    folder: Path, request: Mapping[str, Any] | None = None, *, check_all: bool = False
) -> bool:
    """Tell whether a folder has a complete checkpoint; see ``find_damage``."""
    return find_damage(folder, request, check_all=check_all) is None


def build_into(
    target: Path,
    request: Mapping[str, Any],
    build: Callable[[Path], None],
    *,
    say: Callable[[str], None],
    in_cache: bool = True,
    check_all: bool = False,
) -> None:
    """Make sure that ``target`` has all files that ``build`` writes.

    ``build`` writes into a folder beside the target, which is then renamed. In the
    cache a lock lets one process build while others wait. Other folders have no lock
    file: if two processes build there, the files of the first one to end stay.

    Args:
        target: The folder.
        request: The request that it is built from.
        build: Writes the files into an empty folder.
        say: Called with a line of text before each step that takes long.
        in_cache: Whether the target's name contains the request's digest, so that any
            existing files may be replaced.
        check_all: As for ``find_damage``.

    Raises:
        CheckpointError: The disk is full, the folder cannot be written, or the target
            contains other files.
    """
    if is_intact(target, request, check_all=check_all):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not in_cache:
            _replace(target, request, build, in_cache=False, check_all=check_all)
            return
        with _lock(target, say):
            if is_intact(target, request, check_all=check_all):
                return  # another process has built it meanwhile
            for left in target.parent.glob(f".{target.name}.*{_SUFFIX}"):
                # A process that was killed has left this folder.
                shutil.rmtree(left, ignore_errors=True)
            _replace(target, request, build, in_cache=True, check_all=check_all)
    except OSError as error:
        raise _explain(error, target) from error


@contextmanager
def _lock(target: Path, say: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(target.parent / f".{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that builds {target}")
        try:
            lock.acquire(timeout=_PATIENCE_S)
        except Timeout:
            raise CheckpointError(
                f"{target} has been building in another process for "
                f"{_PATIENCE_S:.0f} s; end that process and run again"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _replace(
    target: Path,
    request: Mapping[str, Any],
    build: Callable[[Path], None],
    *,
    in_cache: bool,
    check_all: bool,
) -> None:
    if os.path.lexists(target):
        _clear(target, request, in_cache=in_cache, check_all=check_all)
    folder = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_SUFFIX, dir=target.parent)
    )
    try:
        build(folder)
        _write_manifest(folder, request)
        try:
            folder.rename(target)
        except OSError:
            if not is_intact(target, request):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear(
    target: Path, request: Mapping[str, Any], *, in_cache: bool, check_all: bool
) -> None:
    """Remove a damaged checkpoint of this request, and nothing else."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
        return
    if not in_cache and not _is_of(target, request):
        raise CheckpointError(
            f"{target} exists and contains other files; choose another folder or "
            "remove it"
        )
    damage = find_damage(target, request, check_all=check_all)
    _log.warning("checkpoint %s is damaged: %s; building it again", target, damage)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink()


def _is_of(folder: Path, request: Mapping[str, Any]) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return bool(manifest["request"] == digest_of(request))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _write_manifest(folder: Path, request: Mapping[str, Any]) -> None:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    manifest = {
        "request": digest_of(request),
        "built_from": request,
        "files": {
            file.name: {
                "bytes": file.stat().st_size,
                "sample": _sample(file),
                "sha256": _digest(file),
            }
            for file in files
        },
    }
    written = folder / MANIFEST
    written.write_text(json.dumps(manifest, indent=1, default=str), encoding="utf-8")
    # safetensors and mkdtemp give permissions only to the owner. A file that was written in
    # the ordinary way has the permissions that the user's umask allows.
    mode = written.stat().st_mode & 0o666
    for file in files:
        file.chmod(mode)
    folder.chmod(mode | (mode & 0o444) >> 2)


def _sample(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE))
        stream.seek(max(file.stat().st_size - _SAMPLE, 0))
        digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def _digest(file: Path) -> str:
    """Return the digest of a file's bytes; a hole counts by its position, unread."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        position = 0
        while position < size:
            start = _next_data(stream.fileno(), position, size)
            if start > position:
                digest.update(f"hole {position}-{start}".encode())
                position = start
                continue
            end = _next_hole(stream.fileno(), position, size)
            stream.seek(position)
            while position < end:
                chunk = stream.read(min(_CHUNK, end - position))
                if not chunk:
                    return digest.hexdigest()
                digest.update(chunk)
                position += len(chunk)
    return digest.hexdigest()


def _next_data(descriptor: int, position: int, size: int) -> int:
    if not hasattr(os, "SEEK_DATA"):
        return position
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError:  # ENXIO: a hole up to the end
        return size


def _next_hole(descriptor: int, position: int, size: int) -> int:
    if not hasattr(os, "SEEK_HOLE"):
        return size
    return os.lseek(descriptor, position, os.SEEK_HOLE)


def check_room(folder: Path, nbytes: int) -> None:
    """Raise an error if the disk cannot hold a checkpoint.

    Raises:
        CheckpointError: Fewer than ``nbytes`` are free.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"the disk of {folder.parent} is too full: {format_size(nbytes)} are "
            f"needed, {format_size(free)} are free; free some, or set "
            "PYTEST_GPUMEM_CACHE to a folder of another disk"
        )


def _explain(error: OSError, target: Path) -> CheckpointError:
    if error.errno in _FULL:
        return CheckpointError(
            f"the disk of {target.parent} is full: {error.strerror}; free some, or set "
            "PYTEST_GPUMEM_CACHE to a folder of another disk"
        )
    return CheckpointError(
        f"{target} cannot be written: {error}; choose another folder, or set "
        "PYTEST_GPUMEM_CACHE to one"
    )
