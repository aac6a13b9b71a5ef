"""The simulated cards of one process: drivers, allocators, budgets, streams."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.allocator.caching import OutOfMemory
from pytest_gpumem.allocator.config import AllocatorConfig, config_from_environment
from pytest_gpumem.allocator.versions import installed_version
from pytest_gpumem.cards import gpus_of, uuids_of
from pytest_gpumem.devices.cuda_errors import cuda_error
from pytest_gpumem.devices.simulated.card import SimulatedCard
from pytest_gpumem.devices.simulated.current_streams import Streams
from pytest_gpumem.devices.simulated.sent_storages import Exchange
from pytest_gpumem.errors import DeviceUnavailableError
from pytest_gpumem.host_memory import anonymous_bytes
from pytest_gpumem.visibility import VISIBLE_VARIABLE, visible_numbers, why_hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.cards import Card
    from pytest_gpumem.devices.simulated.capture import Capture
    from pytest_gpumem.devices.simulated.memory_history import MemoryHistory

#: Torch's message if CUDA sees no card.
#: Source: ``c10/cuda/CUDAFunctions.cpp``, ``device_count_ensure_non_zero``.
NO_CARDS: Final = "No CUDA GPUs are available"

#: Whether a simulated machine computes the values of tensors, or keeps none.
VALUES: Final = ("computed", "none")
#: How code for ``torch.compile`` runs on a card: uncompiled, or not at all.
COMPILED: Final = ("eager", "refused")


class SimulatedMachine:
    """The cards of a simulated machine, and the current card of each thread.

    Args:
        cards: The machine's cards, at least one; ``CUDA_VISIBLE_DEVICES`` selects the
            cards that the process sees.
        config: Settings of the caching allocator, the same for every card; None means
            those of the environment.
        values: One of ``VALUES``: ``"computed"`` by the CPU, or ``"none"``: only shapes
            and bytes, for models larger than the host's memory.

    Attributes:
        value_device: Type of the device that holds values: ``"cpu"``, or ``"meta"`` if no
            values are kept.
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
        #: Whether the warning about uncompiled code was given.
        self.has_told_of_compiling = False
        self.value_device: Final = "cpu" if values == "computed" else "meta"
        settings = config if config is not None else config_from_environment()
        settings = replace(settings, version=installed_version())
        #: The machine's GPUs, as NVML counts them, and the UUID of each card.
        self.gpus: Final = gpus_of(cards)
        self.uuids: Final = uuids_of(cards)
        self.all_cards: Final = tuple(
            SimulatedCard(self, number, card, settings)
            for number, card in enumerate(cards)
        )
        #: Functions that are called if the cards that the process sees change.
        self.on_change: list[Callable[[], None]] = []
        self._cards: tuple[SimulatedCard, ...] | None = None
        self._listed: str | None = None
        self._is_used = False
        #: Whether CUDA is initialised, in torch's sense.
        self.is_initialized = False
        #: Whether children that are forked from now on cannot use CUDA.
        self.spoils_forks = False
        #: Whether this process is such a child.
        self.is_forked = False
        self.history: MemoryHistory | None = None
        #: Functions that are called, without a lock, with card and bytes of a failed
        #: request.
        self.oom_observers: list[Callable[[int, int], None]] = []
        #: Observers of user code. As in torch, they are called with card, segment bytes,
        #: limit and free bytes.
        self.user_oom_observers: list[Callable[[int, int, int, int], object]] = []
        #: Settings of cuDNN that C++ stores; the limit has no effect here. Source:
        #: ``aten/src/ATen/Context.h`` and ``aten/src/ATen/native/Convolution.cpp``.
        self.cudnn: Final[dict[str, Any]] = {"limit": 10, "empties_cache": True}
        #: The settings of ``libraries.py``: preferred libraries, and limits of plans.
        self.preferred: Final[dict[Any, Any]] = {}
        #: The kinds of convolutions for which cuDNN has measured its kernels.
        self.measured_convolutions: Final[set[tuple[Any, ...]]] = set()
        self.streams: Final = Streams()
        #: The storages that other processes have received from this one.
        self.exchange: Final = Exchange()
        #: Blocks that were taken by address, with their cards.
        self.raw_blocks: Final[dict[int, tuple[SimulatedCard, Block]]] = {}
        #: Memory of the host that was registered with CUDA: bytes, by their address.
        self.registered: Final[dict[int, int]] = {}
        #: The graph captures in progress.
        self.captures: tuple[Capture, ...] = ()
        #: What happens when the host waits for a card: 0 nothing, 1 a warning, 2 an error.
        self.sync_debug_mode = 0
        #: Set while a thread frees values: the thread, the host's bytes without these
        #: values, and the time until which others wait for it. Otherwise None.
        self._leaving: tuple[int, int, float] | None = None
        self._local = threading.local()

    @property
    def is_watched(self) -> bool:
        """Whether waits of the host for a card are reported or forbidden."""
        return bool(self.captures) or self.sync_debug_mode != 0

    @property
    def cards(self) -> tuple[SimulatedCard, ...]:
        """The cards that the process sees; until CUDA is used, those it would see now."""
        if not self._is_used:
            self._look()
        return self._cards or ()

    def use(self) -> None:
        """Use CUDA: from the first use on, the visible cards do not change.

        See Note [When the variable is read].
        """
        if not self._is_used:
            self._look()
            self._is_used = True

    def _look(self) -> None:
        listed = os.environ.get(VISIBLE_VARIABLE)
        if self._cards is not None and listed == self._listed:
            return
        before, self._listed = self._cards, listed
        numbers = visible_numbers(self.uuids)
        self._cards = tuple(self.all_cards[number] for number in numbers)
        for index, card in enumerate(self._cards):
            card.index = index
        if before is not None and before != self._cards:
            for changed in tuple(self.on_change):
                if changed in self.on_change:  # not removed by an earlier function
                    changed()

    @property
    def why_none(self) -> str:
        """Part of a sentence: why the process sees no card, and what to do."""
        if os.environ.get(VISIBLE_VARIABLE) == self._listed:
            return f"{why_hidden()}; unset it"
        return (
            f"{VISIBLE_VARIABLE}={self._listed!r} hid every card when this process first used "
            "CUDA; give the code that set it a process of its own"
        )

    @property
    def current_index(self) -> int:
        """The index of the calling thread's current device."""
        return getattr(self._local, "index", 0)

    @current_index.setter
    def current_index(self, index: int) -> None:
        self.card(index)
        self._local.index = index

    def card(self, index: int | None = None) -> SimulatedCard:
        """Use CUDA, and return a card; None means the thread's current one.

        Raises:
            torch.AcceleratorError: There is no such card (CUDA's message).
            RuntimeError: CUDA sees no card at all (torch's message).
        """
        self.use()
        if not self.cards:
            raise RuntimeError(NO_CARDS)
        if index is None:
            index = self.current_index
        if not 0 <= index < len(self.cards):
            raise cuda_error("cudaErrorInvalidDevice")
        return self.cards[index]

    def start_history(self, history: MemoryHistory) -> None:
        """Record every change of memory from now on."""
        self.stop_history()
        self.history = history
        for card in self.all_cards:
            with card.locked() as allocator:
                allocator.trace = partial(_note, history, card)

    def stop_history(self) -> None:
        """Stop recording changes, and delete the recorded ones."""
        self.history = None
        for card in self.all_cards:
            with card.locked() as allocator:
                allocator.trace = None

    def after_fork(self) -> None:
        """Set the state of CUDA in a forked child: unusable if the parent has used CUDA.

        In torch's sense, a process has used CUDA if it has initialised CUDA or counted
        cards, for example by ``torch.cuda.is_available``.

        Source: ``torch/cuda/__init__.py``, ``_lazy_init``; ``poison_fork`` of
        ``torch/csrc/cuda/Module.cpp``.
        """
        self.is_forked = self.is_forked or self.spoils_forks
        self.is_initialized = False
        for card in self.all_cards:
            card.after_fork()

    def tell_oom(self, index: int, error: OutOfMemory) -> None:
        """Call the observers of failed requests; they may use the machine."""
        card = self.cards[index]
        total, limit = card.driver.total_bytes, card.allocator.limit_bytes
        for user in list(self.user_oom_observers):
            free = card.driver.free_bytes
            user(index, error.segment_bytes, total if limit is None else limit, free)
        for observe in list(self.oom_observers):
            observe(index, error.nbytes)

    def host_bytes(self) -> int:
        """Return the bytes of the host's memory that this process holds for itself.

        The values of tensors on the cards are in the host's memory, too, but they count
        as the cards' bytes.
        """
        values = 0
        if self.value_device == "cpu":
            values = sum(card.allocator.requested_bytes for card in self.all_cards)
        held = anonymous_bytes()
        leaving = self._leaving
        if leaving is not None:
            thread, without, end = leaving
            if thread == threading.get_ident() or time.monotonic() > end:
                self._leaving = None
            else:
                held = min(held, without)
        return max(held - values, 0)

    def note_leaving(self, nbytes: int) -> None:
        """Record that the calling thread frees values as soon as their block is released.

        Up to torch 2.9 C++ does so in this order, and lets other threads run meanwhile.
        """
        if self.value_device != "cpu":
            return
        end = time.monotonic() + _PATIENCE_S
        without = max(anonymous_bytes() - nbytes, 0)
        self._leaving = threading.get_ident(), without, end

    @property
    def num_requests(self) -> int:
        """The number of allocations requested so far on all cards."""
        return sum(card.num_requests for card in self.all_cards)


def _note(history: MemoryHistory, card: SimulatedCard, *change: Any) -> None:
    history.note(card.index, *change, is_serving=card.allocator.is_serving)


#: The longest time in seconds to wait for a thread that frees values.
_PATIENCE_S: Final = 0.5

_machines: Final[list[SimulatedMachine]] = []


def _after_fork() -> None:
    """Update the machines in a forked child, and compute with one thread.

    The child has none of its parent's OpenMP threads, and libgomp would wait for them
    forever. With one thread no other is needed. Torch does the same in the workers of a
    DataLoader (``torch/utils/data/_utils/worker.py``, ``_worker_loop``).
    """
    if _machines:
        torch.set_num_threads(1)
    for machine in _machines:
        machine.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_after_fork)


def push_machine(machine: SimulatedMachine) -> None:
    """Make "cuda" mean a machine until the machine is popped."""
    _machines.append(machine)


def pop_machine(machine: SimulatedMachine) -> None:
    """Remove a machine; the previous one is current again."""
    _machines.remove(machine)


def innermost_machine() -> SimulatedMachine | None:
    """Return the machine that "cuda" means now, or None."""
    return _machines[-1] if _machines else None


def current_machine() -> SimulatedMachine:
    """Return the machine that "cuda" means now.

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
        RuntimeError: There is no such card (torch's message).
    """
    return current_machine().card(index)


__all__ = [
    "COMPILED",
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
