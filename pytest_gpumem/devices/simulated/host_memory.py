"""The host's memory that this process holds, for cards without memory of their own.

Note [Memory that a card shares with the host]
An integrated card has no memory of its own: CUDA gives the host's memory as its total,
and what is free of it as free (``cudaMemGetInfo``). What a process holds in the host's
memory is then not free for the card either: a model that is loaded on the host and
copied to the card takes its bytes twice.

The simulated card counts this process's own pages: its heap and its anonymous mappings.
It does not count what the system can take back at once, such as a checkpoint that is
mapped from its file, nor the host's other processes, because the host that simulates a
card is another machine. ``host=SIZE`` of a card gives a figure in place of the count.

Source: CUDA Runtime API, ``cudaMemGetInfo``; CUDA for Tegra, "Memory Management"; DGX
Spark User Guide, "Known Issues"; ``proc(5)``, ``RssAnon`` and ``RssShmem``.
"""

from __future__ import annotations

import re
from typing import Final

_STATUS: Final = "/proc/self/status"
_OWN: Final = re.compile(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB", re.MULTILINE)


def anonymous_bytes() -> int:
    """Return the bytes of this process's pages that no file backs; 0 outside Linux."""
    try:
        with open(_STATUS, "rb") as status:  # noqa: PTH123  # called at each segment
            return sum(int(kib) for kib in _OWN.findall(status.read())) * 1024
    except OSError:
        return 0
