"""Shares the cards of a machine among the workers of pytest-xdist.

Note [A card among workers]
N workers share each card. A test may say how many bytes it needs (``requires_vram``, a
limit, a budget); it starts when these bytes are free among all workers. Any other test may
hold at most an equal share, so that such tests never take bytes from each other. A test's
claim is an entry of the card's ledger, which is removed when the worker ends; see
Note [Entries that die with their process] in ``tenancy/entries.py``.
If there are enough cards, each worker has a different first card: the list of
``CUDA_VISIBLE_DEVICES`` is rotated by the worker's number, so every card stays visible.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.errors import SharedFolderError
from pytest_gpumem.files import IS_POSIX
from pytest_gpumem.inheritance import remove_run, run_folder, tenancy_root
from pytest_gpumem.visibility import VISIBLE_VARIABLE, visible_numbers

if TYPE_CHECKING:
    from pytest_gpumem.devices import Device
    from pytest_gpumem.plugin.settings import Settings
    from pytest_gpumem.tenancy.ledger import Ledger
    from pytest_gpumem.tenancy.shared_card import SharedCard

#: Whether processes can share cards on this system, because claims need ``fcntl``.
_CAN_SHARE: Final = IS_POSIX
#: The environment variable with a worker's position: its number, the number of workers on
#: its machine, and the run.
WORKER_VARIABLE: Final = "PYTEST_GPUMEM_WORKER"


class WorkerPosition(NamedTuple):
    """A worker's number among those of its machine.

    Attributes:
        position: The number, from 0.
        workers: The number of workers.
        run: An id of the run of pytest.
    """

    position: int
    workers: int
    run: str

    @property
    def text(self) -> str:
        """The variable's value."""
        return f"{self.position}/{self.workers}/{self.run}"


def take_position() -> WorkerPosition | None:
    """Return this worker's position, once, because its children are not workers."""
    text = os.environ.pop(WORKER_VARIABLE, None)
    if text is None:
        return None
    position, workers, run = text.split("/")
    return WorkerPosition(int(position), int(workers), run)


class Sharing:
    """The cards of a machine, as one of several processes uses them.

    Args:
        settings: The run's options.
        worker: This process's position among the workers; None if it is the only one.

    Attributes:
        worker: The position; None also if each of the run's workers has its own cards.
        admits: Whether tests wait for their bytes.
        is_capped: Whether the running test may hold at most an equal share.
    """

    def __init__(self, settings: Settings, worker: WorkerPosition | None) -> None:
        self._settings: Final = settings
        alone = worker is None or worker.workers == 1 or settings.share == "own"
        alone = alone or not _CAN_SHARE
        self.worker: Final = None if alone else worker
        self.admits: Final = not alone and settings.share == "equal"
        self.is_capped = self.admits
        self._num_cards = 1
        self._environment: Final = PatchSet()
        self._run: Final = (
            secrets.token_hex(8) if self.worker is None else self.worker.run
        )
        self._ledgers: Final[dict[str, Ledger]] = {}
        self._joined: list[SharedCard] = []
        self._own_folder: str | None = None

    # -- spreading over the cards -----------------------------------------------------

    def spread(self, kind: str) -> None:
        """Give this worker its own first card, before torch is imported.

        Raises:
            pytest.UsageError: Another user could change files that processes share.
        """
        self._check_folder(kind)
        if self.worker is None or kind == "off":
            return
        names = self._visible(kind)
        self._num_cards = max(len(names), 1)
        turn = self.worker.position % self._num_cards
        if turn:
            turned = ",".join((*names[turn:], *names[:turn]))
            self._environment.put(os.environ, VISIBLE_VARIABLE, turned)

    def stop(self) -> None:
        """Give up all claims, and restore the environment."""
        for ledger in self._ledgers.values():
            ledger.hold_idle(0)
        for shared in self._joined:
            shared.leave()
        self._joined = []
        if self._own_folder is not None:
            remove_run(self._own_folder)
            self._own_folder = None
        self._environment.restore()

    def _check_folder(self, kind: str) -> None:
        if not (self.admits and kind != "off") and not self._joins(kind):
            return
        from pytest_gpumem.tenancy.folders import open_private

        try:
            os.close(open_private(tenancy_root()))
        except SharedFolderError as error:
            raise pytest.UsageError(str(error)) from None

    def _joins(self, kind: str) -> bool:
        """Tell whether processes see each other's bytes of simulated cards."""
        is_shared = self.worker is not None or self._settings.reaches_children
        return kind == "simulated" and is_shared and _CAN_SHARE

    def _visible(self, kind: str) -> tuple[str, ...]:
        if kind == "simulated":
            from pytest_gpumem.cards import uuids_of

            uuids = uuids_of(self._settings.all_cards)
            return tuple(map(str, visible_numbers(uuids)))
        listed = os.environ.get(VISIBLE_VARIABLE)
        if listed is not None:
            return tuple(each.strip() for each in listed.split(",") if each.strip())
        from pytest_gpumem.devices.selection import count_cards

        return tuple(str(index) for index in range(count_cards() or 1))

    # -- shares -----------------------------------------------------------------------

    def num_sharing(self, index: int) -> int:
        """Return how many workers share a card of this process."""
        if self.worker is None:
            return 1
        if index:
            return self.worker.workers
        mine = self.worker.position % self._num_cards
        return len(range(mine, self.worker.workers, self._num_cards))

    def share_bytes(self, device: Device, index: int, total_bytes: int) -> int:
        """Return the equal share of a card, including the process's own context."""
        return max(
            total_bytes // self.num_sharing(index), device.context_bytes(index) + 1
        )

    def cap_bytes(self, device: Device, index: int) -> int | None:
        """Return the most that a test without a claim may hold; None for no limit."""
        if not self.admits or not self.is_capped:
            return None
        share = self.share_bytes(device, index, device.total_bytes(index))
        return share - device.context_bytes(index)

    # -- what the processes have in common ----------------------------------------------

    @property
    def folder(self) -> str:
        """The folder in which this run's processes note their bytes; None if there is none."""
        return run_folder(self._run) if _CAN_SHARE else ""

    def ledger(self, device: Device, index: int, total_bytes: int) -> Ledger:
        """Return a card's ledger, shared by workers and, on a real card, by other runs."""
        name = device.card_id(index)
        if name not in self._ledgers:
            from pytest_gpumem.tenancy.ledger import Ledger

            root = self.folder if device.kind == "simulated" else tenancy_root()
            self._ledgers[name] = Ledger(Path(root, f"ledger-{name}"), total_bytes)
        return self._ledgers[name]

    def hold_idle(self, device: Device, index: int) -> None:
        """Note the bytes that this process holds of a card between its tests."""
        held = device.memory_stats(index).get("reserved_bytes.all.current", 0)
        held += device.context_bytes(index)
        if held or device.card_id(index) in self._ledgers:
            total = device.total_bytes(index)
            self.ledger(device, index, total).hold_idle(held)

    def join_cards(self, machine: Any) -> None:
        """Let this process and its children, or the workers, see each other's bytes.

        Args:
            machine: The simulated machine.
        """
        if not self._joins("simulated"):
            return
        from pytest_gpumem.tenancy.shared_card import join_cards

        if self.worker is None:
            self._own_folder = self.folder
        self._joined = join_cards(machine.all_cards, self.folder)
