"""The host's memory that this process holds.

Note [Memory that a card shares with the host]
An integrated card has no memory of its own: CUDA reports the host's memory as its total,
and the host's free memory as free (``cudaMemGetInfo``). Bytes that a process holds in the
host's memory are then not free for the card: a model that is loaded on the host and
copied to the card takes its bytes twice.

The simulated card counts this process's own pages: its heap and its anonymous mappings.
It does not count pages that the system can take back at once, such as a checkpoint that
is mapped from its file. It does not count other processes of the host, because the host
that simulates a card is another machine. ``host=SIZE`` of a card replaces the count.

Source: CUDA Runtime API, ``cudaMemGetInfo``; CUDA for Tegra, "Memory Management"; DGX
Spark User Guide, "Known Issues"; ``proc(5)``, ``RssAnon`` and ``RssShmem``.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_STATUS: Final = "/proc/self/status"
_CLEAR: Final = "/proc/self/clear_refs"
_OWN: Final = re.compile(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)
_PEAK: Final = re.compile(rb"^VmHWM:\s+(\d+) kB", re.MULTILINE)


def anonymous_bytes() -> int:
    """Return the bytes of this process's pages that no file backs; 0 outside Linux."""
    return _kib(_OWN) * 1024


def _kib(pattern: re.Pattern[bytes]) -> int:
    try:
        with open(_STATUS, "rb") as status:  # noqa: PTH123  # called at each segment
            return sum(int(kib) for kib in pattern.findall(status.read()))
    except OSError:
        return 0


class ResidentPeak:
    """The most bytes that this process has held in the host's memory since it was made.

    All resident pages count, also those of mapped files and libraries. At the start the
    system's own record of the peak (``VmHWM``) is set to the present bytes; from then on
    ``getrusage`` also reports only the peak since that moment. If the record cannot be
    set, the peak of the process's lifetime (``ru_maxrss``) is used. If it has grown since
    the start, it is the peak since the start; otherwise that peak is not known.

    Source: ``proc(5)``, ``/proc/pid/clear_refs``, value 5; ``getrusage(2)``: KiB on Linux
    and the BSDs, and bytes on macOS.
    """

    def __init__(self) -> None:
        self._is_reset: Final = _reset()
        self._start: Final = _lifetime_peak()

    def read(self) -> int | None:
        """Return the peak so far in bytes; None if it is not known."""
        if self._is_reset:
            return _kib(_PEAK) * 1024 or None
        peak = _lifetime_peak()
        return peak if peak > self._start else None


def _reset() -> bool:
    try:
        Path(_CLEAR).write_bytes(b"5")
    except OSError:
        return False
    return _kib(_PEAK) > 0


def _lifetime_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] | None = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return trim


def give_back_free_heap() -> None:
    """Let glibc give the heap's free pages back to the system, which counts them as used.

    With another C library nothing is done. Source: ``malloc_trim(3)``.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
