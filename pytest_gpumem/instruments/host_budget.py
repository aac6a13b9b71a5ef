"""Holds a block of code to a budget of the host's memory."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.host_memory import anonymous_bytes, give_back_free_heap
from pytest_gpumem.instruments.sampler import Sampler
from pytest_gpumem.stacks import frames_from

if TYPE_CHECKING:
    from collections.abc import Callable

#: Seconds between two samples.
PERIOD_S: Final = 0.01
#: The folder whose code computes the values of a simulated card.
_SIMULATED: Final = str(Path(__file__).parents[1] / "devices" / "simulated")


class HostBudget(Sampler):
    """Limit the bytes that a block adds to the process's memory on the host.

    Within the block ``psutil.virtual_memory`` reports at most the rest of the budget as
    available. The plans of accelerate and transformers (``get_max_memory``,
    ``device_map="auto"``) call it, and put the weights that do not fit on disk. The
    bytes that the block adds nevertheless are measured in samples, see ``most_added``.

    A process's own pages count: its heap and its anonymous mappings. Pages that a file
    backs do not, because the system can take them back at once, and counts them as
    available itself. The values of tensors on a simulated card do not count either.

    Args:
        nbytes: The budget in bytes, inclusive.
        own_bytes: Returns the bytes that count; see ``SimulatedMachine.host_bytes``.
        period_s: The least seconds between two samples.

    Limits: code that imported the function itself (``from psutil import
    virtual_memory``) before the block, and child processes, see the real memory of the
    host. Bytes that are allocated and freed between two samples are not seen. Outside
    Linux nothing that the block adds is counted.

    Source: accelerate, ``utils/modeling.py``, ``get_max_memory``; transformers,
    ``integrations/accelerate.py``, ``get_max_memory``; ``proc(5)``, ``MemAvailable``.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        own_bytes: Callable[[], int] = anonymous_bytes,
        period_s: float = PERIOD_S,
    ) -> None:
        super().__init__(period_s)
        self.nbytes: Final = nbytes
        self._own_bytes: Final = own_bytes
        self._patches: Final = PatchSet()
        self._base = 0
        self._most = 0

    def __enter__(self) -> HostBudget:  # noqa: PYI034  # Self needs Python 3.11
        self.rebase()
        try:
            import psutil
        except ImportError:
            pass  # accelerate needs psutil, so without it nothing plans
        else:
            original = psutil.virtual_memory
            self._patches.set(
                psutil, "virtual_memory", lambda: self._capped(original())
            )
        return super().__enter__()

    def close(self) -> None:
        """End the budget; safe to call twice."""
        try:
            super().close()
        finally:
            self._patches.restore()

    def rebase(self) -> None:
        """Count only the bytes that are added from now on."""
        give_back_free_heap()
        self._base, self._most = self._own_bytes(), 0

    @property
    def most_added(self) -> int:
        """The largest sample of the bytes that the block added.

        A sample above the budget counts only if it is confirmed after the heap's free pages
        were given back.
        """
        return self._most

    def sample(self) -> None:
        """Take a sample now."""
        added = self._added()
        if added is not None and added > max(self.nbytes, self._most):
            give_back_free_heap()
            added = self._added()
        if added is not None:
            self._most = max(self._most, added)

    def _added(self) -> int | None:
        """Return the bytes that the block added; None while a card's values are computed.

        New values are in memory before they are counted as the card's.
        """
        if _computes():
            return None
        added = self._own_bytes() - self._base
        return None if _computes() else added

    def _capped(self, real: Any) -> Any:
        """Return psutil's answer with no more memory than the budget."""
        give_back_free_heap()
        left = max(self.nbytes - (self._own_bytes() - self._base), 0)
        total = min(real.total, self.nbytes)
        available = min(real.available, left, total)
        return real._replace(
            total=total,
            available=available,
            percent=round((total - available) / total * 100, 1),
            used=total - available,
            free=min(real.free, available),
        )


def _computes() -> bool:
    """Tell whether another thread is in the code of a simulated card."""
    me = threading.get_ident()
    return any(
        each.f_code.co_filename.startswith(_SIMULATED)
        for ident, frame in sys._current_frames().items()  # noqa: SLF001  # the documented way to see other threads
        if ident != me
        for each in frames_from(frame)
    )
