"""What was on a card when memory ran out, as plain numbers, and what would help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pytest_gpumem.sizes import format_size

#: How far a batch is cut before a smaller one is given up.
_LARGEST_CUT: Final = 1024


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """Bytes on a card that Python can see.

    Attributes:
        nbytes: Bytes of the storage.
        what: Shape and dtype.
        owner: Who holds it, in words; empty if nobody was found.
    """

    nbytes: int
    what: str
    owner: str


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model that is on a card in whole or in part, or is just being put there.

    Attributes:
        name: Its class.
        whole_bytes: Its parameters and buffers, wherever they are.
        on_card_bytes: Those that are on the card.
        float32_bytes: Those of the whole that are float32.
        largest_layer_bytes: The largest that one module holds by itself.
        largest_layer: That module's path.
    """

    name: str
    whole_bytes: int
    on_card_bytes: int
    float32_bytes: int
    largest_layer_bytes: int
    largest_layer: str


@dataclass(frozen=True, slots=True)
class Process:
    """Another process on the card; ``name`` is empty where it cannot be told."""

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
        room_bytes: What this process may hold of it: the budget, or what others leave.
        allocated_bytes: Bytes in live tensors.
        reserved_bytes: Bytes held from the driver.
        largest_free_bytes: The largest free block among those.
        nbytes: Bytes asked for; on a real card, of the segment that this needs.
        site: Who asked, in words.
        phase: What the program was doing.
        injected_by: The rule that refused the request; None if there was no room.
        limit: For a broken limit, in words.
        tensors: The largest live ones.
        num_tensors: How many storages there are.
        seen_bytes: Bytes of all of them.
        models: Models with something on the card.
        kept_bytes: Bytes of gradients and optimisers' state.
        processes: Others on the card.
        note: What could not be found out, and why; else empty.
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
        """Reserved and not allocated."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def whole_bytes(self) -> int:
        """All the models' weights, wherever they are."""
        return sum(each.whole_bytes for each in self.models)

    @property
    def missing_bytes(self) -> int:
        """The models' weights that are not on the card yet, while one is put there."""
        if self.phase != "load":
            return 0
        return self.whole_bytes - self._weights_on_card

    @property
    def other_bytes(self) -> int:
        """Live bytes that are neither weights, gradients nor an optimiser's state."""
        return max(self.allocated_bytes - self._weights_on_card - self.kept_bytes, 0)

    @property
    def request_bytes(self) -> int:
        """The request, unless it is for a weight that ``missing_bytes`` has already."""
        return 0 if self.missing_bytes else self.nbytes

    @property
    def needed_bytes(self) -> int:
        """What the program needs as it is, at least: what is live and what is to come."""
        return self.allocated_bytes + self.missing_bytes + self.request_bytes

    @property
    def _weights_on_card(self) -> int:
        return sum(each.on_card_bytes for each in self.models)


@dataclass(frozen=True, slots=True)
class Remedy:
    """Something that would need less.

    Attributes:
        name: What to do.
        reason: The arithmetic, in words.
        needed_bytes: What would be needed instead.
        fits: Whether there is room for that.
    """

    name: str
    reason: str
    needed_bytes: int
    fits: bool


def remedies(incident: Incident) -> list[Remedy]:
    """Return what would need less memory than there was, by plain arithmetic.

    What is counted is what was live at that moment, the request and, during a load,
    the weights still to come. What a program would ask for later is not known, nor is
    what rounding and fragments take.
    """
    found = (_half(incident), _offload(incident), _batch(incident))
    return [each for each in found if each is not None]


def _half(incident: Incident) -> Remedy | None:
    """Weights of two bytes; what else there is counts as it is."""
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
    """Weights on the host, one layer at a time on the card; not while training."""
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
    """A batch cut in two, four, ..., as far as that helps."""
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
        f"{format_size(growing)} that are no weights, gradients or optimiser's state "
        f"become {format_size(growing // cut)}, if all of them grow with the batch",
        fixed + growing // cut,
    )


def _remedy(incident: Incident, name: str, reason: str, needed: int) -> Remedy:
    return Remedy(name, reason, needed, fits=needed <= incident.room_bytes)
