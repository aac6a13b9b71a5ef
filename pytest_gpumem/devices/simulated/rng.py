"""Random numbers on the simulated cards: each card has its own generator state."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

_lock: Final = threading.RLock()
_generators: Final[WeakKeyDictionary[SimulatedCard, torch.Generator]] = (
    WeakKeyDictionary()
)


def generator_of(card: SimulatedCard) -> torch.Generator:
    """Return the card's default generator (a CPU one: the CPU draws the numbers)."""
    with _lock:
        if card not in _generators:
            _generators[card] = torch.Generator()
        return _generators[card]


@contextmanager
def drawing_for(card: SimulatedCard) -> Iterator[None]:
    """Let operators that know no generator draw from the card's, for a block.

    The CPU's default generator is as before afterwards: numbers drawn on a card do
    not move it, as on a real one. Numbers differ from a real card's (Philox there,
    Mersenne Twister here); the same seed gives the same numbers on every run.
    """
    default = torch.default_generator
    with _lock:
        generator = generator_of(card)
        saved = default.get_state()
        default.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(default.get_state())
            default.set_state(saved)
