"""What a program asks of a card's allocator, in order: sizes, frees, what stays.

It reads the history that PyTorch's allocator keeps of itself, so that it is the same on
PyTorch's own CUDA code and on the simulated card.

A phase is a list of whole numbers: a positive one is a request for so many bytes, a
negative one, ``-n``, gives back what the ``n``-th request of the case asked for, and 0
gives back what was there before its phases, or between them.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Requests = list[int]

#: Blocks are cut to this many bytes. Source: ``kMinBlockSize`` of
#: ``c10/cuda/CUDACachingAllocator.cpp``.
_BLOCK: Final = 512


class Notes:
    """Notes what each phase of a case asks for.

    Args:
        settle: Called before the history is read; it waits until threads of autograd
            have let go of what they ran.

    Attributes:
        phases: Requests by phase.
    """

    def __init__(self, settle: Callable[[], object] = lambda: None) -> None:
        self.phases: dict[str, Requests] = {}
        self._settle = settle
        self._read = 0
        self._count = 0
        self._numbers: dict[int, int] = {}
        torch.cuda.memory._record_memory_history(
            "all", context=None, stacks="python", clear_history=True
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note what the block asks for."""
        self._advance(is_counted=False)
        yield
        self.phases[name] = self._advance(is_counted=True)

    def _advance(self, *, is_counted: bool) -> Requests:
        """Return what was asked for since the last time."""
        self._settle()
        entries: list[dict[str, Any]]
        entries = torch.cuda.memory._snapshot()["device_traces"][0]
        found = []
        for entry in entries[self._read :]:
            if entry["action"] == "alloc":
                self._count += is_counted
                self._numbers[entry["addr"]] = self._count if is_counted else 0
                found.append(entry["size"])
            elif entry["action"] == "free_requested":
                found.append(-self._numbers.pop(entry["addr"], 0))
        self._read = len(entries)
        return found


def stop() -> None:
    """Keep no history any more."""
    torch.cuda.memory._record_memory_history(None)


def sizes(requests: Requests) -> Requests:
    """Return the sizes that were asked for, in order, in bytes."""
    return [each for each in requests if each > 0]


def peaks(phases: dict[str, Requests]) -> dict[str, int]:
    """Return how many bytes each phase adds at its peak, in bytes of blocks.

    What a phase gives back of what was there before the phases counts as 0 bytes.
    """
    asked: Requests = []
    found = {}
    for name, requests in phases.items():
        changes = []
        for each in requests:
            if each > 0:
                asked.append(-(-each // _BLOCK) * _BLOCK)
            changes.append(asked[-1] if each > 0 else -asked[-each - 1] if each else 0)
        found[name] = max(accumulate(changes, initial=0))
    return found


def kept(requests: Requests) -> Requests:
    """Return the sizes of what a first phase leaves behind, in order of its requests."""
    back = {-each for each in requests if each < 0}
    asked = sizes(requests)
    return [each for number, each in enumerate(asked, 1) if number not in back]
