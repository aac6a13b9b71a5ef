"""Where checkpoints are kept, and how they come to be whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock

from pytest_gpumem.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MANIFEST: Final = "pytest_gpumem.json"
#: Bytes read from either end of a file to tell whether it is the one written.
_SAMPLE: Final = 2**20


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache: as given, else ``PYTEST_GPUMEM_CACHE``, else the user's."""
    if given is not None:
        return Path(given)
    named = os.environ.get("PYTEST_GPUMEM_CACHE")
    if named:
        return Path(named)
    import platformdirs  # noqa: PLC0415  # only where nothing was named

    return Path(platformdirs.user_cache_path("pytest-gpumem")) / "checkpoints"


def digest_of(request: Mapping[str, Any]) -> str:
    """Return a digest of what a checkpoint was built from."""
    text = json.dumps(request, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_intact(folder: Path, request: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a folder holds a whole checkpoint, of a request if one is given.

    Sizes of all files and the first and last MiB of each are compared with what was
    written; damage in between is not seen.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        if request is not None and manifest["request"] != digest_of(request):
            return False
        return all(_describe(folder / name) == each for name, each in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _describe(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(_SAMPLE))
        stream.seek(max(size - _SAMPLE, 0))
        digest.update(stream.read(_SAMPLE))
    return {"bytes": size, "sample": digest.hexdigest()}


def build_into(
    target: Path,
    request: Mapping[str, Any],
    build: Callable[[Path], None],
    *,
    say: Callable[[str], None],
) -> None:
    """Make sure that ``target`` holds what ``build`` writes, whole.

    ``build`` writes into a folder beside the target, which is then renamed. A lock
    lets one process build while others wait.

    Raises:
        CheckpointError: The disk is full, the place cannot be written, or the target
            holds something else.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if is_intact(target, request):
                return
            if target.exists():
                _clear(target, say)
            _build(target, request, build)
    except OSError as error:
        raise _explain(error, target) from error


def _clear(target: Path, say: Callable[[str], None]) -> None:
    """Remove a damaged or outdated checkpoint of ours, and nothing else."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
        return
    if not (target / MANIFEST).is_file():
        raise CheckpointError(
            f"{target} exists and was not written by pytest-gpumem; give another --out "
            "or remove it"
        )
    say(f"{target} is damaged or of another request; building it anew")
    shutil.rmtree(target)


def _build(
    target: Path, request: Mapping[str, Any], build: Callable[[Path], None]
) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        build(folder)
        files = {
            file.name: _describe(file) for file in sorted(folder.iterdir()) if file.is_file()
        }
        manifest = {"files": files, "request": digest_of(request)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        folder.chmod(0o755)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_room(folder: Path, nbytes: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        CheckpointError: Fewer than ``nbytes`` are free.
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"the disk of {folder.parent} is full: {nbytes} bytes are needed, {free} are "
            "free; free some, or set PYTEST_GPUMEM_CACHE to another disk"
        )


def _explain(error: OSError, target: Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return CheckpointError(
            f"the disk of {target.parent} is full: {error}; free some, or set "
            "PYTEST_GPUMEM_CACHE to another disk"
        )
    return CheckpointError(f"{target} cannot be written: {error}")
