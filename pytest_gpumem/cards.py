"""Simulated cards: those of the table, and made-up ones."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pytest_gpumem.cards_table import (
    CARDS,
    SLICES,
    SLICES_OF_COMPUTE,
    SLICES_OF_MEMORY,
    Card,
    memory_slices,
)
from pytest_gpumem.errors import CardError, SizeError
from pytest_gpumem.sizes import format_size, parse_size
from pytest_gpumem.visibility import uuid_of, uuid_of_slice, visible_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The card of a run that names none. Free notebooks and most CI machines with a GPU have
#: this card, and its total is known to the byte.
DEFAULT_CARD: Final = "T4"
#: The newest CUDA version that the driver of a simulated machine supports, which is that of
#: PyTorch's wheels of torch 2.13 for Linux, and the version of the first driver that
#: supports it. Source: CUDA Toolkit 13.0 Release Notes, "CUDA Driver".
CUDA_VERSION: Final = "13.0"
DRIVER_VERSION: Final = "580.65.06"
#: The most cards of one simulated machine.
MAX_CARDS: Final = 64

#: The smallest segment that PyTorch's allocator takes from the driver.
_SMALLEST_BYTES: Final = 2 * 2**20
#: The id of the first GPU instance of a size, by slices of compute: what nvidia-smi shows
#: for A100 and H100 in public outputs.
_FIRST_INSTANCE: Final = {"1": 7, "2": 3, "3": 1, "4": 1, "7": 0}
_KEYS: Final = ("cc", "sms", "ctx", "nccl", "host", "name")
_MAKERS: Final = re.compile(r"nvidia|tesla|geforce|rtx")
_ALIASES: Final = {"h10080gb": "H100", "t416gb": "T4", "p10016gb": "P100"}
_SIZE: Final = re.compile(r"[0-9.]+\s*([kmgt](i?b)?|b|%)|[0-9]{7,}", re.IGNORECASE)
_GRAMMAR: Final = (
    "write a name (T4, A100-80GB), a made-up card (16GiB,cc=8.0), several of one "
    "(A100-80GB*2) or several kinds (T4+A100-80GB)"
)
_OF_NAMED: Final = ("ctx", "nccl")
_OF_INTEGRATED: Final = (*_OF_NAMED, "host")


def find_card(text: str) -> tuple[Card, ...]:
    """Return the cards of a machine.

    Args:
        text: ``CARD``, ``CARD*COUNT``, or several of these joined by ``+``.

            A card of the table is given by its name there or by the driver's name. Case,
            blanks, hyphens and words such as NVIDIA do not matter: ``rtx 4090``,
            ``NVIDIA A100-SXM4-80GB``. A slice (MIG) is ``A100-80GB:1g.10gb``. After the
            name ``,ctx=SIZE`` sets the bytes of a process's context, ``,nccl=SIZE`` those
            of each communicator of NCCL, and ``,host=SIZE``, for a card without memory of
            its own, the bytes of the shared memory that the host holds.

            A made-up card is
            ``SIZE[,cc=MAJOR.MINOR][,sms=COUNT][,ctx=SIZE][,nccl=SIZE][,host=SIZE][,name=NAME]``.
            By default its compute capability is 8.0 and its context takes 0 bytes.
            ``host=`` makes it a card without memory of its own. Other properties are those
            of the table's first card of that capability, or of the next lower one.

    Raises:
        CardError: The text names no card; the message suggests names.

    Example::

        assert len(find_card("A100-80GB*2")) == 2
    """
    cards: list[Card] = []
    for part in text.split("+"):
        description, star, count = (piece.strip() for piece in part.partition("*"))
        if star and not re.fullmatch(r"[1-9][0-9]?", count):
            raise _error(
                text, f"{count!r} is not a number of cards", "write for example T4*2"
            )
        cards += [_card(text, description)] * (int(count) if star else 1)
    if len(cards) > MAX_CARDS:
        raise _error(
            text, f"{len(cards)} cards", f"at most {MAX_CARDS} can be simulated"
        )
    return tuple(cards)


def visible_cards(cards: Sequence[Card]) -> tuple[Card, ...]:
    """Return the cards that ``CUDA_VISIBLE_DEVICES`` shows at present, in its order."""
    return tuple(cards[number] for number in visible_numbers(uuids_of(cards)))


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of a machine, as NVML counts them.

    Attributes:
        index: Its index.
        card: The whole card, also if the machine has only slices of it.
        numbers: The numbers of the machine's cards that are on it: one card, or several
            slices (MIG).
        is_divided: Whether it is in MIG mode, so that the machine has slices of it.
    """

    index: int
    card: Card
    numbers: tuple[int, ...]

    is_divided: bool = False

    @property
    def uuid(self) -> str:
        """Its UUID."""
        return uuid_of(self.index)

    @property
    def bus(self) -> int:
        """The number of its PCI bus; each GPU has one of its own."""
        return self.index + 1

    @property
    def bus_id(self) -> str:
        """Its address on the PCI bus, as NVML writes it."""
        return f"00000000:{self.bus:02X}:00.0"

    @property
    def can_be_divided(self) -> bool:
        """Whether slices (MIG) of such a card are known."""
        return any(CARDS[each.parent] == self.card for each in SLICES.values())

    def instances(self, cards: Sequence[Card]) -> list[tuple[int, int]]:
        """Return the ids of GPU instance and compute instance of each of its slices.

        NVIDIA's driver numbers the instances of each size from a first number on; which of
        them are free is modelled. Each GPU instance has one compute instance.

        Args:
            cards: The machine's cards.
        """
        given: dict[int, int] = {}
        found = []
        for number in self.numbers:
            first = _FIRST_INSTANCE.get(cards[number].profile[:1], 1)
            taken = given.setdefault(first, 0)
            given[first] += 1
            found.append((first + taken, 0))
        return found


def gpus_of(cards: Sequence[Card]) -> tuple[Gpu, ...]:
    """Return the GPUs on which a machine's cards are.

    Slices of one kind of card that follow each other are on one GPU, as far as it has
    room for them. Source: NVIDIA Multi-Instance GPU User Guide, "Supported MIG Profiles":
    seven slices of compute, eight of memory.
    """
    found: list[Gpu] = []
    for number, card in enumerate(cards):
        if card.parent:
            last = found[-1] if found else None
            together = [cards[other] for other in last.numbers] if last else []
            if (
                last is not None
                and together[0].parent == card.parent
                and _fit_together([*together, card])
            ):
                found[-1] = replace(last, numbers=(*last.numbers, number))
                continue
        whole = CARDS[card.parent] if card.parent else card
        found.append(Gpu(len(found), whole, (number,), bool(card.parent)))
    return tuple(found)


def _fit_together(slices: list[Card]) -> bool:
    """Tell whether one GPU has room for these slices."""
    compute = sum(int(each.profile[0]) for each in slices)
    memory = sum(memory_slices(CARDS[each.parent], each.total_bytes) for each in slices)
    return compute <= SLICES_OF_COMPUTE and memory <= SLICES_OF_MEMORY


def uuids_of(cards: Sequence[Card]) -> tuple[str, ...]:
    """Return the UUID of each card of a machine, in the order of CUDA."""
    return tuple(
        uuid_of_slice(number) if cards[number].parent else gpu.uuid
        for gpu in gpus_of(cards)
        for number in gpu.numbers
    )


def _card(text: str, description: str) -> Card:
    if not description:
        raise _error(text, "a card is missing", _GRAMMAR)
    head, *pairs = (piece.strip() for piece in description.split(","))
    if _SIZE.fullmatch(head) or "=" in head:
        return _made_up_card(text, head, _pairs(text, pairs, _KEYS))
    card = _named(text, head)
    given = _pairs(text, pairs, _OF_INTEGRATED if card.is_integrated else _OF_NAMED)
    found: dict[str, int] = {}
    for key, field in (
        ("ctx", "given_context_bytes"),
        ("nccl", "nccl_bytes"),
        ("host", "host_bytes"),
    ):
        if key in given:
            found[field] = _part(text, key, given[key], card.total_bytes)
    return replace(card, **found)  # type: ignore[arg-type]  # both values are bytes


def _named(text: str, description: str) -> Card:
    if ":" in description or "mig" in description.lower().split():
        return _named_slice(text, description)
    wanted = _plain(description)
    wanted = _plain(_ALIASES.get(wanted, wanted))
    by_key = {_plain(key): card for key, card in CARDS.items()}
    if wanted in by_key:
        return by_key[wanted]
    variants = [key for key, card in CARDS.items() if wanted == _plain(card.name)]
    if len(variants) == 1:
        return CARDS[variants[0]]
    if not variants:
        variants = [key for key in CARDS if wanted == _plain(key.partition("-")[0])]
    if wanted and variants:
        raise _error(
            text,
            f"{description!r} comes in several sizes",
            f"write {' or '.join(variants)}",
        )
    names = {_plain(key): key for key in CARDS}
    close = difflib.get_close_matches(wanted, names, cutoff=0.5)
    raise _error(
        text,
        f"{description!r} is not a known card",
        f"did you mean {' or '.join(names[name] for name in close)}? Known are "
        f"{', '.join(CARDS)}"
        if close
        else f"known are {', '.join(CARDS)}; {_GRAMMAR}",
    )


def _named_slice(text: str, description: str) -> Card:
    """Return a slice by ``CARD:PROFILE``, or by the driver's ``NAME MIG PROFILE``."""
    name, colon, profile = description.partition(":")
    if not colon:
        name, _mig, profile = re.split(r"\b(mig)\b", description, flags=re.IGNORECASE)
    whole = _named(text, name)
    parent = next(key for key, card in CARDS.items() if card == whole)
    profiles = {
        key.partition(":")[2]: card
        for key, card in SLICES.items()
        if card.parent == parent
    }
    if not profiles:
        divided = ", ".join(dict.fromkeys(card.parent for card in SLICES.values()))
        raise _error(
            text,
            f"no slices (MIG) of {parent} are known",
            f"known are those of {divided}; or make a card up: 10GiB,cc=8.0,sms=14",
        )
    card = profiles.get(profile.strip().lower())
    if card is None:
        raise _error(
            text,
            f"{profile.strip()!r} is not a known slice (MIG) of {parent}",
            f"known are {', '.join(profiles)}",
        )
    return card


def _pairs(text: str, pairs: list[str], keys: tuple[str, ...]) -> dict[str, str]:
    """Return the values of ``KEY=VALUE`` pairs, by key; each key is given at most once."""
    given: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if key == "host" and key not in keys:
            raise _error(
                text,
                "host is for a card without memory of its own",
                f"give {', '.join(keys)}, or make such a card up: 16GiB,{pair}",
            )
        if key in _KEYS and key not in keys:
            raise _error(
                text,
                f"{key} is fixed for a card of the table",
                f"give {', '.join(keys)}, or make a card up: 16GiB,{key}={value}",
            )
        if key not in keys or not equals or not value or key in given:
            raise _error(
                text,
                f"{pair!r} is not KEY=VALUE",
                f"keys, each at most once: {', '.join(keys)}",
            )
        given[key] = value
    return given


def _made_up_card(text: str, size: str, given: dict[str, str]) -> Card:
    try:
        total_bytes = parse_size(size)
    except SizeError as error:
        raise CardError(f"card {text!r}: {error}", value=text) from None
    if total_bytes < _SMALLEST_BYTES:
        raise _error(
            text,
            f"{size!r} is too small for one segment of the allocator",
            f"give at least {format_size(_SMALLEST_BYTES)}",
        )
    model = _model(text, given.get("cc", "8.0"))
    sms = given.get("sms", str(model.multi_processor_count))
    if not re.fullmatch(r"[1-9][0-9]{0,3}", sms):
        raise _error(text, f"sms={sms!r} is not a count", "give 1 to 9999")
    return replace(
        model,
        given_context_bytes=_part(text, "ctx", given.get("ctx", "0"), total_bytes),
        nccl_bytes=_part(text, "nccl", given.get("nccl", "0"), total_bytes),
        is_integrated="host" in given,
        host_bytes=(
            _part(text, "host", given["host"], total_bytes) if "host" in given else None
        ),
        nvml_name="",
        name=given.get("name", f"Simulated GPU {format_size(total_bytes)}"),
        total_bytes=total_bytes,
        multi_processor_count=int(sms),
        precision_bytes=1,
        source="made up",
    )


def _part(text: str, key: str, size: str, total_bytes: int) -> int:
    """Return the bytes of a card that a key's value takes."""
    try:
        nbytes = 0 if size == "0" else parse_size(size)
    except SizeError as error:
        raise CardError(f"card {text!r}: {key}: {error}", value=text) from None
    if nbytes >= total_bytes:
        raise _error(
            text,
            f"{key}={size!r} leaves no room on the card",
            "give less than its size",
        )
    return nbytes


def _model(text: str, capability: str) -> Card:
    """Return the table's card from which a made-up card of a capability is derived."""
    match = re.fullmatch(r"([0-9]{1,2})\.([0-9])", capability)
    wanted = (int(match[1]), int(match[2])) if match else (0, 0)
    known = sorted({card.compute_capability for card in CARDS.values()})
    below = [each for each in known if each <= wanted]
    if not below:
        raise _error(
            text,
            f"cc={capability!r} is not a compute capability",
            f"give MAJOR.MINOR from {'.'.join(map(str, known[0]))} on, such as 8.0",
        )
    model = next(
        card for card in CARDS.values() if card.compute_capability == below[-1]
    )
    return replace(model, compute_capability=wanted)


def _plain(name: str) -> str:
    return _MAKERS.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))


def _error(text: str, reason: str, advice: str) -> CardError:
    return CardError(f"card {text!r}: {reason}; {advice}", value=text)


__all__ = [
    "CARDS",
    "DEFAULT_CARD",
    "MAX_CARDS",
    "SLICES",
    "Card",
    "Gpu",
    "find_card",
    "gpus_of",
    "uuids_of",
    "visible_cards",
]
