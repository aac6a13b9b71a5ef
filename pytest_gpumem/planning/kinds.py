"""Divides the bytes of a card's peak by kind: weights, gradients, activations, …."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from pytest_gpumem.devices.simulated.card import SimulatedCard
    from pytest_gpumem.devices.simulated.device import SimulatedDevice

#: Each kind of bytes, in the order in which they are shown.
KINDS: Final = (
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "cache",
    "inputs",
    "workspaces",
)


class PeakByKind:
    """The blocks that were live at a card's peak, each with its kind.

    A block without a mark counts as an activation, which is a computed tensor.

    Args:
        device: The simulated machine; its first card is observed.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        self._device: Final = device
        self._card: Final[SimulatedCard] = device.machine.cards[0]
        self._tracing = device.tracing(self._trace)
        # Blocks are numbered, because an address is used by several blocks in turn.
        self._numbers: dict[int, int] = {}
        self._sizes: Final[dict[int, int]] = {}
        self._kinds: Final[dict[int, str]] = {}
        self._num_blocks = 0
        self._since: set[int] = set()
        self._gone: set[int] = set()
        self.peak_bytes = 0

    def __enter__(self) -> PeakByKind:  # noqa: PYI034  # Self needs Python 3.11
        self._tracing.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tracing.__exit__(kind, error, trace)

    def _trace(
        self, _index: int, address: int, change: int, allocated: int, _reserved: int
    ) -> None:
        if change > 0:
            self._num_blocks += 1
            self._numbers[address] = number = self._num_blocks
            self._sizes[number] = change
            if allocated > self.peak_bytes:
                self.peak_bytes = allocated
                self._since.clear()
                self._forget_the_dead()
            else:
                self._since.add(number)
            return
        gone = self._numbers.pop(address, None)
        if gone is None:
            return
        if gone in self._since:
            self._since.remove(gone)
            self._drop(gone)
        else:
            self._gone.add(gone)

    def _forget_the_dead(self) -> None:
        for number in self._gone:
            self._drop(number)
        self._gone.clear()

    def _drop(self, number: int) -> None:
        del self._sizes[number]
        self._kinds.pop(number, None)

    def mark(self, kind: str, tensors: object) -> None:
        """Mark the tensors in a tree with a kind; blocks keep their first kind.

        Args:
            kind: One of ``KINDS``.
            tensors: Tensors on the card, in any nesting of lists, tuples and mappings.
        """
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                address = self._device.block_address(tensor.untyped_storage())
                self._mark(kind, address)

    def _mark(self, kind: str, address: int | None) -> None:
        number = None if address is None else self._numbers.get(address)
        if number is not None:
            self._kinds.setdefault(number, kind)

    def at_peak(self) -> dict[str, int]:
        """Return the bytes of each kind at the peak; kinds without bytes are left out."""
        for block in self._card.workspaces.values():
            self._mark("workspaces", block.address)
        bytes_of = dict.fromkeys(KINDS, 0)
        for number in self._at_peak():
            bytes_of[self._kinds.get(number, "activations")] += self._sizes[number]
        return {kind: nbytes for kind, nbytes in bytes_of.items() if nbytes}

    def _at_peak(self) -> Iterator[int]:
        yield from self._gone
        for number in self._numbers.values():
            if number not in self._since:
                yield number
