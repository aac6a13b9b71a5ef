"""The state of the simulated cards at one moment, for ``nvidia-smi``."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_gpumem.cards import DEFAULT_CARD, Gpu, find_card, gpus_of, uuids_of
from pytest_gpumem.inheritance import CHILDREN_VARIABLE, EVERY_CARD, Inheritance
from pytest_gpumem.sizes import parse_size

if TYPE_CHECKING:
    from pytest_gpumem.cards_table import Card

#: Ids of simulated competing processes begin here; by default the system has lower ids.
#: Source: ``PID_MAX_LIMIT`` is 4,194,304 on Linux, ``pid_max`` 32,768 unless raised.
_PRETENDED: Final = 900_000


@dataclass(frozen=True, slots=True)
class CardProcess:
    """A process on a card.

    Attributes:
        pid: Its id.
        name: Its program, or a note that the process is a simulated one.
        nbytes: Its bytes, including its context.
        instance: The ids of the GPU instance and the compute instance on which it is;
            None if the GPU is not divided (MIG).
    """

    pid: int
    name: str
    nbytes: int
    instance: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class SliceNow:
    """One slice (MIG) of a GPU at one moment.

    Attributes:
        card: The slice.
        uuid: Its UUID.
        instance: The ids of its GPU instance and its compute instance.
        used_bytes: Its bytes that are not free.
    """

    card: Card
    uuid: str
    instance: tuple[int, int]
    used_bytes: int


@dataclass(frozen=True, slots=True)
class CardNow:
    """One GPU at one moment.

    Attributes:
        gpu: The GPU; its index is NVML's, which ``CUDA_VISIBLE_DEVICES`` does not change.
        processes: The processes that hold bytes of it.
        free_bytes: The bytes that are free for the asking program, under its budget.
        slices: Its slices, if it is divided (MIG).
    """

    gpu: Gpu
    processes: tuple[CardProcess, ...]
    free_bytes: int
    slices: tuple[SliceNow, ...] = ()

    @property
    def index(self) -> int:
        """NVML's index."""
        return self.gpu.index

    @property
    def card(self) -> Card:
        """The whole card, also if it is divided."""
        return self.gpu.card

    @property
    def name(self) -> str:
        """The name that NVML gives."""
        return self.card.nvml_name or self.card.name

    @property
    def mig_mode(self) -> str | None:
        """Whether it is in MIG mode; None if such a card cannot be divided."""
        if not self.gpu.can_be_divided:
            return None
        return "Enabled" if self.gpu.is_divided else "Disabled"

    @property
    def uuid(self) -> str:
        """The GPU's UUID."""
        return self.gpu.uuid

    @property
    def bus_id(self) -> str:
        """The GPU's address on the PCI bus."""
        return self.gpu.bus_id

    @property
    def total_bytes(self) -> int:
        """The card's total as CUDA reports it."""
        return self.card.total_bytes

    @property
    def used_bytes(self) -> int:
        """The bytes that are not free."""
        return self.total_bytes - self.free_bytes


def read_cards() -> list[CardNow] | None:
    """Return every card of the run that started this process; None if there is no run.

    Raises:
        ValueError: The run's settings cannot be read.
    """
    text = os.environ.get(CHILDREN_VARIABLE)
    if not text:
        return None
    given = Inheritance.parse(text)
    if given.backend != "simulated":
        return None
    cards = find_card(given.options.get("card", DEFAULT_CARD))
    # The run numbers only the cards that it sees, NVML numbers all of them.
    uuids = uuids_of(cards)
    seen = given.seen_of(uuids)
    ancestors = _ancestors()
    parts = [
        _part_now(
            number,
            card,
            given,
            str(seen.index(number)) if number in seen else "",
            ancestors,
        )
        for number, card in enumerate(cards)
    ]
    return [_gpu_now(gpu, cards, uuids, parts) for gpu in gpus_of(cards)]


def _gpu_now(
    gpu: Gpu,
    cards: tuple[Card, ...],
    uuids: tuple[str, ...],
    parts: list[tuple[tuple[CardProcess, ...], int]],
) -> CardNow:
    """Return a GPU from the processes and the free bytes of each of its cards."""
    if not gpu.is_divided:
        processes, free = parts[gpu.numbers[0]]
        if gpu.card.nvml_name:
            processes = ()  # NVML lists none there
        return CardNow(gpu, processes, free)
    slices = tuple(
        SliceNow(
            cards[number],
            uuids[number],
            instance,
            cards[number].total_bytes - parts[number][1],
        )
        for number, instance in zip(gpu.numbers, gpu.instances(cards), strict=True)
    )
    listed = tuple(
        replace(process, instance=each.instance)
        for number, each in zip(gpu.numbers, slices, strict=True)
        for process in parts[number][0]
    )
    used = sum(each.used_bytes for each in slices)
    return CardNow(gpu, listed, gpu.card.total_bytes - used, slices)


def _part_now(
    number: int, card: Card, given: Inheritance, index: str, ancestors: list[int]
) -> tuple[tuple[CardProcess, ...], int]:
    """Return the processes on a card, and its free bytes."""
    held = _held(given.shared, number)
    held |= {int(pid): held for pid, held in given.tenants.get(index, {}).items()}
    free = max(card.total_bytes - sum(held.values()), 0)
    budget = given.budgets.get(index, given.budgets.get(EVERY_CARD))
    if budget is not None and index:
        # The program that asks is the nearest of this process's ancestors on the card.
        own = next((held[pid] for pid in ancestors if pid in held), 0)
        reserved = max(own - card.context_bytes, 0)
        left = parse_size(budget, of=card.total_bytes) - reserved
        free = min(free, max(left, 0))
    processes = tuple(
        CardProcess(pid, _name_of(pid), nbytes) for pid, nbytes in sorted(held.items())
    )
    return processes, free


def _held(shared: str, number: int) -> dict[int, int]:
    """Return the bytes that each process has noted for a card."""
    folder = Path(shared) / f"card-{number}"
    if not shared or not folder.is_dir():
        return {}
    from pytest_gpumem.tenancy.entries import Folder

    held: dict[int, int] = {}
    for value in Folder(folder).read().values():
        held[value["pid"]] = held.get(value["pid"], 0) + value["nbytes"]
    return {pid: nbytes for pid, nbytes in held.items() if nbytes}


def _ancestors() -> list[int]:
    """Return the ids of the processes above this one, the nearest first."""
    found = []
    pid = os.getppid()
    while pid > 0 and pid not in found:
        found.append(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
            # The second field is the program's name in brackets, which may hold both.
            pid = int(stat.rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError, UnicodeDecodeError):
            break
    return found


def _name_of(pid: int) -> str:
    if pid > _PRETENDED:
        return "competing_process"
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "[Not Found]"
    return line.partition(b"\0")[0].decode(errors="replace") or "[Not Found]"
