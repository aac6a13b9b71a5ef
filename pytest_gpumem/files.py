"""Files that are whole or not there at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def write_atomically(path: str | os.PathLike[str], text: str | Iterable[str]) -> None:
    """Write a text file so that a reader finds the old text or all of the new.

    Folders on the way are made. The permissions of a file that is replaced are kept.
    A lone surrogate, as names in another encoding have, becomes the escape that JSON
    reads as the same.

    Args:
        path: The file.
        text: Its text, or the text's pieces; what UTF-8 has not is written escaped.

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


def _write(path: str | os.PathLike[str], pieces: Iterable[bytes]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=".tmp", dir=target.parent
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes a file for its owner alone.
        mode = target.stat().st_mode if target.exists() else 0o666 & ~_umask()
        Path(temporary).chmod(mode)
        Path(temporary).replace(target)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
