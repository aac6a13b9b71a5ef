"""The simulated cards of one process: drivers, allocators, budgets, streams."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.allocator.caching import OutOfMemory
from pytest_gpumem.allocator.config import AllocatorConfig, config_from_environment
from pytest_gpumem.allocator.versions import installed_version
from pytest_gpumem.devices.simulated.card import SimulatedCard
from pytest_gpumem.devices.simulated.current_streams import Streams
from pytest_gpumem.errors import DeviceUnavailableError
from pytest_gpumem.visibility import VARIABLE, visible_numbers, why_hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.cards import Card
    from pytest_gpumem.devices.simulated.capture import Capture
    from pytest_gpumem.devices.simulated.memory_history import MemoryHistory

#: What torch says of a device index that is not there (cudaErrorInvalidDevice).
INVALID_ORDINAL: Final = (
    "CUDA error: invalid device ordinal\n"
    "GPU device may be out of range, do you have enough GPUs?"
)


#: What torch says where CUDA sees no card.
#: Source: ``c10/cuda/CUDAFunctions.cpp``, ``device_count_ensure_non_zero``.
NO_CARDS: Final = "No CUDA GPUs are available"

#: What a simulated machine may keep of tensors' values.
VALUES: Final = ("computed", "none")
#: What happens to code that is to be compiled into kernels of a card.
COMPILED: Final = ("eager", "refused")


class SimulatedMachine:
    """The cards of a simulated machine, and which one is current in each thread.

    Args:
        cards: The machine's cards, at least one; ``CUDA_VISIBLE_DEVICES`` says which
            of them the process sees.
        config: Settings of the caching allocator, the same for every card; None takes
            the environment's.
        values: One of ``VALUES``: ``"computed"`` by the CPU, or ``"none"``, shapes and
            bytes only, for models larger than the host.

    Attributes:
        value_device: Type of the device that values lie on: ``"cpu"``, or ``"meta"``
            where there are none.
    """

    def __init__(
        self,
        cards: Sequence[Card],
        *,
        config: AllocatorConfig | None = None,
        values: str = "computed",
        compiled: str = "eager",
    ) -> None:
        if values not in VALUES:
            raise ValueError(f"values={values!r}; accepted are {', '.join(VALUES)}")
        if compiled not in COMPILED:
            raise ValueError(
                f"compiled={compiled!r}; accepted are {', '.join(COMPILED)}"
            )
        self.compiled: Final = compiled
        #: Whether it was said that code which is to be compiled runs as it is.
        self.has_told_of_compiling = False
        self.value_device: Final = "cpu" if values == "computed" else "meta"
        settings = config if config is not None else config_from_environment()
        settings = replace(settings, version=installed_version())
        self.all_cards: Final = tuple(
            SimulatedCard(self, number, card, settings)
            for number, card in enumerate(cards)
        )
        #: Called where the cards that the process sees have become others.
        self.on_change: list[Callable[[], None]] = []
        self._cards: tuple[SimulatedCard, ...] | None = None
        self._listed: str | None = None
        self._is_used = False
        #: Whether anything was put on a card: torch's "CUDA is initialized".
        self.is_initialized = False
        #: Whether this process was forked from one that had put something on a card.
        self.is_forked = False
        self.history: MemoryHistory | None = None
        #: Called with card and bytes once a request has failed and no lock is held.
        self.oom_observers: list[Callable[[int, int], None]] = []
        #: User code's, as torch calls them: card, segment bytes, limit, free bytes.
        self.user_oom_observers: list[Callable[[int, int, int, int], object]] = []
        #: What C++ keeps for cuDNN, which does not compute here. Source:
        #: ``aten/src/ATen/Context.h`` and ``aten/src/ATen/native/Convolution.cpp``.
        self.cudnn: Final[dict[str, Any]] = {"limit": 10, "empties_cache": True}
        self.streams: Final = Streams()
        #: The captures of graphs that are under way.
        self.captures: tuple[Capture, ...] = ()
        self._local = threading.local()

    @property
    def cards(self) -> tuple[SimulatedCard, ...]:
        """The cards that the process sees; until CUDA is used, as it would see them."""
        if not self._is_used:
            self._look()
        return self._cards or ()

    def use(self) -> None:
        """Use CUDA: from the first time on, the process sees the same cards.

        See Note [When the variable is read].
        """
        if not self._is_used:
            self._look()
            self._is_used = True

    def _look(self) -> None:
        listed = os.environ.get(VARIABLE)
        if self._cards is not None and listed == self._listed:
            return
        before, self._listed = self._cards, listed
        numbers = visible_numbers(len(self.all_cards))
        self._cards = tuple(self.all_cards[number] for number in numbers)
        for index, card in enumerate(self._cards):
            card.index = index
        if before is not None and before != self._cards:
            for changed in tuple(self.on_change):
                if changed in self.on_change:  # not taken back by another of them
                    changed()

    @property
    def why_none(self) -> str:
        """Why the process sees no card, and what to do, as half a sentence."""
        if os.environ.get(VARIABLE) == self._listed:
            return f"{why_hidden()}; unset it"
        return (
            f"{VARIABLE}={self._listed!r} hid every card when this process first used "
            "CUDA; give the code that set it a process of its own"
        )

    @property
    def current_index(self) -> int:
        """Index of the calling thread's current device."""
        return getattr(self._local, "index", 0)

    @current_index.setter
    def current_index(self, index: int) -> None:
        self.card(index)
        self._local.index = index

    def card(self, index: int | None = None) -> SimulatedCard:
        """Use CUDA, and return a card; None means the thread's current one.

        Raises:
            RuntimeError: There is no such card (torch's text).
        """
        self.use()
        if not self.cards:
            raise RuntimeError(NO_CARDS)
        if index is None:
            index = self.current_index
        if not 0 <= index < len(self.cards):
            raise RuntimeError(INVALID_ORDINAL)
        return self.cards[index]

    def start_history(self, history: MemoryHistory) -> None:
        """Keep every change of memory from here on."""
        self.stop_history()
        self.history = history
        for card in self.all_cards:
            with card.locked() as allocator:
                allocator.trace = partial(_note, history, card)

    def stop_history(self) -> None:
        """Keep no more changes, and forget those kept."""
        self.history = None
        for card in self.all_cards:
            with card.locked() as allocator:
                allocator.trace = None

    def after_fork(self) -> None:
        """Be what CUDA is in a forked child: of no use, if the parent had used it.

        Source: ``torch/cuda/__init__.py``, ``_lazy_init``.
        """
        self.is_forked = self.is_forked or self.is_initialized
        self.is_initialized = False
        for card in self.all_cards:
            card.after_fork()

    def tell_oom(self, index: int, error: OutOfMemory) -> None:
        """Tell the observers of a request that failed; they may ask anything."""
        card = self.cards[index]
        total, limit = card.driver.total_bytes, card.allocator.limit_bytes
        for user in list(self.user_oom_observers):
            free = card.driver.free_bytes
            user(index, error.segment_bytes, total if limit is None else limit, free)
        for observe in list(self.oom_observers):
            observe(index, error.nbytes)

    @property
    def num_requests(self) -> int:
        """How many allocations all cards were asked for so far."""
        return sum(card.num_requests for card in self.all_cards)


def _note(history: MemoryHistory, card: SimulatedCard, *change: Any) -> None:
    history.note(card.index, *change)


_machines: Final[list[SimulatedMachine]] = []


def _after_fork() -> None:
    """Renew the machines; the host, which computes for their cards, has one thread left.

    The child has none of its parent's OpenMP threads, and libgomp waits for them for
    ever. One thread asks for no other; torch has it so in workers of a DataLoader
    (``torch/utils/data/_utils/worker.py``, ``_worker_loop``).
    """
    if _machines:
        torch.set_num_threads(1)
    for machine in _machines:
        machine.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_after_fork)


def push_machine(machine: SimulatedMachine) -> None:
    """Make a machine the one that "cuda" means, until it is popped."""
    _machines.append(machine)


def pop_machine(machine: SimulatedMachine) -> None:
    """Take a machine away again; the one before it is current once more."""
    _machines.remove(machine)


def innermost_machine() -> SimulatedMachine | None:
    """Return the machine that "cuda" means at present, or None."""
    return _machines[-1] if _machines else None


def current_machine() -> SimulatedMachine:
    """Return the machine that "cuda" means at present.

    Raises:
        DeviceUnavailableError: No simulated machine is installed.
    """
    if not _machines:
        raise DeviceUnavailableError(
            "no simulated CUDA device is installed; use "
            "pytest_gpumem.devices.simulated.simulated_device() or run under pytest "
            "with --gpu-backend=simulated"
        )
    return _machines[-1]


def card_of(index: int | None) -> SimulatedCard:
    """Return a card of the current machine; None means the thread's current one.

    Raises:
        RuntimeError: There is no such card (torch's text).
    """
    return current_machine().card(index)


__all__ = [
    "COMPILED",
    "INVALID_ORDINAL",
    "NO_CARDS",
    "VALUES",
    "OutOfMemory",
    "SimulatedCard",
    "SimulatedMachine",
    "card_of",
    "current_machine",
    "innermost_machine",
    "pop_machine",
    "push_machine",
]
