"""Take away what Python has not on macOS, before anything else is imported.

There is no ``/proc``, and processes are spawned. Source: Python's documentation,
"multiprocessing", "Contexts and start methods".
"""

from __future__ import annotations

import builtins
import io
import multiprocessing
import os

_open = io.open


def _open_there(file: object, *args: object, **kwargs: object) -> object:
    if isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith("/proc/"):
        raise FileNotFoundError(2, "No such file or directory", os.fspath(file))
    return _open(file, *args, **kwargs)  # type: ignore[call-overload]


io.open = builtins.open = _open_there  # type: ignore[assignment]
multiprocessing.set_start_method("spawn")
