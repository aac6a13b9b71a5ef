"""Divides the bytes of a card's peak by kind: weights, gradients, activations, …."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch.utils._pytree import tree_leaves

from pytest_gpumem.instruments.live_peak import LivePeak

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.card import SimulatedCard
    from pytest_gpumem.devices.simulated.device import SimulatedDevice

#: Each kind of bytes, in the order in which they are shown.
FIT_KINDS: Final = (
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "cache",
    "inputs",
    "workspaces",
)


@dataclass(slots=True)
class _Block:
    """A block of the card; its kind is empty until it is marked."""

    nbytes: int
    kind: str = ""


class PeakByKind:
    """The blocks that were live at a card's peak, each with its kind.

    A block without a mark counts as an activation, which is a computed tensor.

    Args:
        device: The simulated machine, whose first card is observed.

    Attributes:
        stage: The present stage of the task, which the report of an OOM names.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self._device: Final = device
        self._card: Final[SimulatedCard] = device.machine.cards[0]
        self._blocks: Final[dict[int, _Block]] = {}
        self._peak: Final = LivePeak[_Block]()
        self.stage = "load"

    def trace(
        self, _index: int, address: int, change: int, allocated: int, _reserved: int
    ) -> None:
        """Note a change of memory; see ``Device.tracing``."""
        if change > 0:
            self._blocks[address] = _Block(change)
            self._peak.gain(address, allocated)
        else:
            self._peak.lose(address, self._blocks.pop(address, None))

    def mark(self, kind: str, tensors: object) -> None:
        """Mark the tensors in a tree with a kind; blocks keep their first kind.

        Args:
            kind: One of ``FIT_KINDS``.
            tensors: Tensors on the card, in any nesting of lists, tuples and mappings.
        """
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                address = self._device.block_address(tensor.untyped_storage())
                self._mark(kind, address)

    def _mark(self, kind: str, address: int | None) -> None:
        block = None if address is None else self._blocks.get(address)
        if block is not None:
            block.kind = block.kind or kind

    def at_peak(self) -> dict[str, int]:
        """Return the bytes of each kind at the peak; kinds without bytes are left out."""
        for workspace in self._card.workspaces.values():
            self._mark("workspaces", workspace.address)
        bytes_of = dict.fromkeys(FIT_KINDS, 0)
        for block in self._peak.live(self._blocks):
            bytes_of[block.kind or "activations"] += block.nbytes
        return {kind: nbytes for kind, nbytes in bytes_of.items() if nbytes}
