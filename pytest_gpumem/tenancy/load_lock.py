"""One load at a time on each card, in tests and in production."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_gpumem.inheritance import tenancy_root
from pytest_gpumem.tenancy.entries import Folder

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def gpu_load_lock(
    device: int | str = 0,
    *,
    timeout_s: float | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Iterator[None]:
    """Hold a card's load lock: no other process is inside it meanwhile.

    Loading needs more than the loaded model; two loads at once may not fit where two
    models do. A process that dies gives the lock back. Like `threading.RLock`, a thread
    may enter it again inside, as a pipeline does whose parts hold it for themselves.

    Args:
        device: The card: an index as CUDA counts it, or any name that the processes
            agree on, such as a UUID.
        timeout_s: The longest wait; None waits for ever.
        folder: What the processes share; by default the environment variable
            ``PYTEST_GPUMEM_TENANCY``, else a folder of this user.

    Raises:
        TimeoutError: The wait was longer than ``timeout_s``.
    """
    card = physical_card(device) if isinstance(device, int) else device
    root = Path(tenancy_root() if folder is None else folder)
    path = Path(root.absolute(), f"load-{card}")
    path.mkdir(parents=True, exist_ok=True)  # a service outlives what cleans /tmp
    with _folder(path).mutex(timeout_s):
        yield


@cache
def _folder(path: Path) -> Folder:
    """Return this process's one folder of that path: its mutex nests by object."""
    return Folder(path)


def physical_card(index: int) -> str:
    """Return what ``CUDA_VISIBLE_DEVICES`` calls a card: an index, a UUID, a MIG name.

    Raises:
        ValueError: The variable shows no such card.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(index)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if not 0 <= index < len(names):
        raise ValueError(
            f"device={index}: CUDA_VISIBLE_DEVICES={visible!r} shows {len(names)} card(s)"
        )
    return names[index].replace("/", "_")
