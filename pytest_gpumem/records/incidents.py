"""Describes a card at the moment when memory ran out, and changes that need less memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pytest_gpumem.sizes import format_size

#: The largest divisor of a batch that is tried.
_LARGEST_CUT: Final = 1024


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor on a card that Python can reach.

    Attributes:
        nbytes: Bytes of the storage.
        what: Shape and dtype.
        owner: What holds it, in words; empty if no holder was found.
    """

    nbytes: int
    what: str
    owner: str


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model that is on a card, completely or in part, or is being moved there.

    Attributes:
        name: Its class.
        whole_bytes: Bytes of all its parameters and buffers, on any device.
        on_card_bytes: Bytes of its parameters and buffers on the card.
        float32_bytes: Bytes of its float32 parameters and buffers, on any device.
        largest_layer_bytes: Bytes of the largest layer, without the layers inside it.
        largest_layer: The path of the largest layer.
    """

    name: str
    whole_bytes: int
    on_card_bytes: int
    float32_bytes: int
    largest_layer_bytes: int
    largest_layer: str


@dataclass(frozen=True, slots=True)
class Process:
    """Another process on the card; ``name`` is empty if it is not known."""

    pid: int
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Incident:
    """The moment in which an allocation failed, or went over a limit.

    Attributes:
        kind: ``"oom"`` or ``"limit"``.
        device_index: The card.
        card: Its name.
        total_bytes: Its total.
        budget_bytes: Its budget, or None.
        room_bytes: The most bytes that this process may hold: the budget, or the bytes
            that other processes leave.
        allocated_bytes: Bytes in live tensors.
        reserved_bytes: Bytes held from the driver.
        largest_free_bytes: The largest free block of the reserved bytes.
        nbytes: Requested bytes; on a real card, the bytes of the segment for the request.
        site: The code that requested them, in words.
        phase: What the program was doing.
        injected_by: The rule that failed the request; None if there was no room.
        limit: The broken limit, in words; empty for an OOM.
        tensors: The largest live tensors.
        num_tensors: The number of live storages.
        seen_bytes: Bytes of all live storages.
        models: Models with parameters or buffers on the card.
        kept_bytes: Bytes of gradients and optimisers' state.
        processes: Other processes on the card.
        note: What is not known, and why; empty if everything is known.
    """

    kind: str
    device_index: int
    card: str
    total_bytes: int
    budget_bytes: int | None
    room_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    largest_free_bytes: int
    nbytes: int
    site: str
    phase: str
    injected_by: str | None = None
    limit: str = ""
    tensors: tuple[LiveTensor, ...] = ()
    num_tensors: int = 0
    seen_bytes: int = 0
    models: tuple[ModelSize, ...] = ()
    kept_bytes: int = 0
    processes: tuple[Process, ...] = ()
    note: str = ""

    @property
    def fragmented_bytes(self) -> int:
        """Bytes that are reserved and not allocated."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def whole_bytes(self) -> int:
        """The weights of all models, on any device."""
        return sum(each.whole_bytes for each in self.models)

    @property
    def missing_bytes(self) -> int:
        """The weights that are not on the card yet, while a model is moved there."""
        if self.phase != "load":
            return 0
        return self.whole_bytes - self._weights_on_card

    @property
    def other_bytes(self) -> int:
        """Live bytes that are neither weights, gradients nor an optimiser's state."""
        return max(self.allocated_bytes - self._weights_on_card - self.kept_bytes, 0)

    @property
    def request_bytes(self) -> int:
        """The request, unless ``missing_bytes`` counts it as a weight already."""
        return 0 if self.missing_bytes else self.nbytes

    @property
    def needed_bytes(self) -> int:
        """The least that the unchanged program needs: live bytes, request, missing weights."""
        return self.allocated_bytes + self.missing_bytes + self.request_bytes

    @property
    def _weights_on_card(self) -> int:
        return sum(each.on_card_bytes for each in self.models)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change after which the program would need less memory.

    Attributes:
        name: The change.
        reason: The arithmetic, in words.
        needed_bytes: Bytes that the program would need after the change.
        fits: Whether the card has room for these bytes.
    """

    name: str
    reason: str
    needed_bytes: int
    fits: bool


def remedies(incident: Incident) -> list[Remedy]:
    """Return changes after which the program would need less memory.

    The arithmetic counts the live bytes at that moment, the request and, during a load,
    the weights that are not loaded yet. It does not count later requests of the program,
    rounding and fragments, which are not known.
    """
    found = (_half(incident), _offload(incident), _batch(incident))
    return [each for each in found if each is not None]


def _half(incident: Incident) -> Remedy | None:
    """Use two bytes for each weight; all other bytes stay the same."""
    full = sum(each.float32_bytes for each in incident.models)
    if not full:
        return None
    return _remedy(
        incident,
        "half precision",
        f"float32 weights of {format_size(full)} become {format_size(full // 2)}",
        incident.needed_bytes - full // 2,
    )


def _offload(incident: Incident) -> Remedy | None:
    """Keep weights on the host and one layer at a time on the card; not for training."""
    trains = incident.kept_bytes or incident.phase in ("backward", "optimizer")
    if not incident.whole_bytes or trains:
        return None
    largest = max(incident.models, key=lambda each: each.largest_layer_bytes)
    return _remedy(
        incident,
        "offload to the CPU",
        f"weights of {format_size(incident.whole_bytes)} stay on the host but for one "
        f"layer at a time, the largest of {format_size(largest.largest_layer_bytes)} "
        f"({largest.largest_layer or largest.name})",
        incident.needed_bytes - incident.whole_bytes + largest.largest_layer_bytes,
    )


def _batch(incident: Incident) -> Remedy | None:
    """Divide the batch by two, four, ..., as long as this helps."""
    growing = incident.other_bytes + incident.request_bytes
    if incident.phase == "load" or not growing:
        return None
    fixed = incident.needed_bytes - growing
    cut = 2
    while cut < _LARGEST_CUT and fixed + growing // cut > incident.room_bytes:
        cut *= 2
    if fixed + growing // cut > incident.room_bytes:
        cut = 2
    return _remedy(
        incident,
        f"a batch {cut} times smaller",
        f"{format_size(growing)} of neither weights, gradients nor optimiser's state "
        f"become {format_size(growing // cut)}, if all of them grow with the batch",
        fixed + growing // cut,
    )


def _remedy(incident: Incident, name: str, reason: str, needed: int) -> Remedy:
    return Remedy(name, reason, needed, fits=needed <= incident.room_bytes)
