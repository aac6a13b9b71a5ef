"""Snapshots of the cards' memory that PyTorch's memory_viz opens."""

from __future__ import annotations

import hashlib
import pickle
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.cuda_history import is_kept
from pytest_gpumem.files import write_bytes_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The pickle protocol that memory_viz reads; it has an unpickler of its own.
#: Source: ``torch/utils/viz/MemoryViz.js``.
PROTOCOL: Final = 4
#: The number of changes of memory that are kept, the newest; each has its Python frames.
ENTRIES: Final = 20_000
_NAME: Final = 100


@contextmanager
def history_kept() -> Iterator[None]:
    """Keep changes of memory for a block, so that snapshots show their frames.

    If user code keeps a history already, its own settings stay.
    """
    if is_kept():
        yield
        return
    keep = torch.cuda.memory._record_memory_history  # noqa: SLF001  # torch has no public function for it
    keep(max_entries=ENTRIES, stacks="python")
    try:
        yield
    finally:
        keep(enabled=None)


def take_snapshot() -> dict[str, Any]:
    """Return the cards' memory at this moment, and the changes that led to it."""
    snapshot: dict[str, Any] = torch.cuda.memory._snapshot()  # noqa: SLF001  # torch has no public function for it
    return snapshot


def snapshot_name(test: str) -> str:
    """Return a distinct file name for a test, of letters, digits and ``._-``."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", test).strip("-.") or "test"
    digest = hashlib.sha256(test.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[:_NAME]}-{digest}.pickle"


def write_snapshot(snapshot: dict[str, Any], folder: Path, test: str) -> Path:
    """Write a snapshot, completely or not at all; return the file.

    Raises:
        OSError: It cannot be written.
    """
    file = folder / snapshot_name(test)
    write_bytes_atomically(file, pickle.dumps(snapshot, protocol=PROTOCOL))
    return file
