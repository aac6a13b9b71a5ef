"""Random numbers on the simulated cards: each card has its own generator state."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch

from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.refusals import refuse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

_lock: Final = threading.RLock()
_generators: Final[WeakKeyDictionary[SimulatedCard, torch.Generator]] = (
    WeakKeyDictionary()
)


def generator_of(card: SimulatedCard) -> torch.Generator:
    """Return the card's default generator."""
    with _lock:
        if card not in _generators:
            _generators[card] = CardGenerator(card.index)
        return _generators[card]


_generator: Final[Any] = torch.Generator


class CardGenerator(_generator):  # type: ignore[misc]  # torch's C type, held as Any
    """``torch.Generator("cuda")``: the CPU draws, the generator says it is a card's."""

    def __new__(cls, index: int) -> CardGenerator:  # noqa: PYI034  # Self needs 3.11
        """Make a CPU generator of this class."""
        made: CardGenerator = _generator.__new__(cls)
        made._index = index
        made._offset = 0
        return made

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index
        self._offset = 0

    def get_offset(self) -> int:
        """Return the offset that was set last; draws do not move it here."""
        return self._offset

    def set_offset(self, offset: int) -> None:
        """Keep an offset.

        Raises:
            RuntimeError: The offset is no multiple of four (torch's text).
        """
        if offset % 4:
            raise RuntimeError("offset must be a multiple of 4")
        self._offset = offset

    def clone_state(self) -> CardGenerator:
        """Return another generator of the card in the same state."""
        twin = CardGenerator(self._index)
        twin.__setstate__(self.__reduce__()[2])
        return twin

    def graphsafe_get_state(self) -> Any:
        """Refuse: the state that a CUDA graph captures is on no card.

        Raises:
            UnsupportedOnSimulatedDeviceError: Always.
        """
        refuse("Generator.graphsafe_get_state")

    def graphsafe_set_state(self, _state: Any) -> Any:
        """Refuse, as ``graphsafe_get_state`` does.

        Raises:
            UnsupportedOnSimulatedDeviceError: Always.
        """
        refuse("Generator.graphsafe_set_state")

    def __reduce__(self) -> Any:
        # As ``THPGenerator_reduce`` of ``torch/csrc/Generator.cpp``.
        state = (self.initial_seed(), self._offset, self.get_state())
        return GeneratorName, (self.device,), state

    def __setstate__(self, state: tuple[int, int, torch.Tensor]) -> None:
        seed, self._offset, inner = state
        self.manual_seed(seed)
        self.set_state(inner)

    @property
    def device(self) -> torch.device:
        """The card."""
        return torch.device("cuda", self._index)


class _GeneratorType(type):
    """Answers for ``torch.Generator``, whose C code has no generators of cards."""

    def __call__(cls, device: Any = "cpu") -> Any:
        named = _generator().device if device is None else torch.device(device)
        if named.type != "cuda":
            return _generator(named)
        return CardGenerator(card_of(named.index).index)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _generator)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, _generator)


class GeneratorName(metaclass=_GeneratorType):
    """``torch.Generator`` while cards are simulated."""

    # What pickles name it by.
    __module__ = "torch"
    __qualname__ = "Generator"


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
