"""Simulated cards: real ones by name, made-up ones by description."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Final

from pytest_gpumem.errors import CardError, SizeError
from pytest_gpumem.sizes import parse_size

_MIB: Final = 2**20
_GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class Limits:
    """What a compute capability fixes; sizes in bytes.

    Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute
    Capability".
    """

    threads_per_multi_processor: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int


#: By compute capability; a capability that is not here takes the one below it.
_LIMITS: Final[dict[tuple[int, int], Limits]] = {
    (3, 7): Limits(2048, 112 * 1024, 48 * 1024),
    (6, 0): Limits(2048, 64 * 1024, 48 * 1024),
    (7, 0): Limits(2048, 96 * 1024, 96 * 1024),
    (7, 5): Limits(1024, 64 * 1024, 64 * 1024),
    (8, 0): Limits(2048, 164 * 1024, 163 * 1024),
    (8, 6): Limits(1536, 100 * 1024, 99 * 1024),
    (8, 9): Limits(1536, 100 * 1024, 99 * 1024),
    (9, 0): Limits(2048, 228 * 1024, 227 * 1024),
    (10, 0): Limits(2048, 228 * 1024, 227 * 1024),
    (12, 0): Limits(1536, 100 * 1024, 99 * 1024),
}


@dataclass(frozen=True, slots=True)
class Card:
    """A card as the CUDA runtime describes it.

    Attributes:
        name: As ``torch.cuda.get_device_name`` says it.
        total_bytes: The card's memory, as ``cudaMemGetInfo`` totals it.
        compute_capability: Major and minor.
        multi_processor_count: Streaming multiprocessors.
        l2_cache_size: Bytes.
        source: Where ``total_bytes`` comes from, and how exactly it is known.
    """

    name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    multi_processor_count: int
    l2_cache_size: int = 4 * _MIB
    source: str = "made up"

    @property
    def _limits(self) -> Limits:
        below = [cc for cc in _LIMITS if cc <= self.compute_capability]
        return _LIMITS[max(below, default=min(_LIMITS))]

    @property
    def max_threads_per_multi_processor(self) -> int:
        """Resident threads of a multiprocessor."""
        return self._limits.threads_per_multi_processor

    @property
    def regs_per_multiprocessor(self) -> int:
        """32-bit registers of a multiprocessor; the K80 has twice as many."""
        return 131072 if self.compute_capability == (3, 7) else 65536

    @property
    def shared_memory_per_block(self) -> int:
        """Bytes a block may use without asking: 48 KiB on every card."""
        return 48 * 1024

    @property
    def shared_memory_per_block_optin(self) -> int:
        """Bytes a block may ask for."""
        return self._limits.shared_memory_per_block_optin

    @property
    def shared_memory_per_multiprocessor(self) -> int:
        """Bytes of a multiprocessor."""
        return self._limits.shared_memory_per_multiprocessor


def _mib(count: int) -> tuple[int, str]:
    return count * _MIB, "torch's device properties, whole MiB"


def _gib(count: float) -> tuple[int, str]:
    nbytes = int(count * _GIB) // (2 * _MIB) * (2 * _MIB)
    return nbytes, "text of an out-of-memory report, GiB with two decimals"


def _card(
    name: str,
    total: tuple[int, str],
    compute_capability: tuple[int, int],
    multi_processor_count: int,
    l2_mib: float,
) -> Card:
    nbytes, source = total
    return Card(
        name,
        nbytes,
        compute_capability,
        multi_processor_count,
        int(l2_mib * _MIB),
        source,
    )


#: Real cards by short name. Totals are what programs printed on such cards; they vary
#: by some MiB with driver, board and ECC.
CARDS: Final[dict[str, Card]] = {
    "K80": replace(
        _card("Tesla K80", _mib(11441), (3, 7), 13, 1.5),
        total_bytes=11996954624,
        source="the allocator recordings of tests/recordings, exact; 11.17 GiB",
    ),
    "P100": _card("Tesla P100-PCIE-16GB", _mib(16280), (6, 0), 56, 4),
    "V100-16GB": _card("Tesla V100-SXM2-16GB", _mib(16160), (7, 0), 80, 6),
    "V100-32GB": _card("Tesla V100-SXM2-32GB", _gib(31.75), (7, 0), 80, 6),
    "T4": _card("Tesla T4", _mib(15102), (7, 5), 40, 4),
    "RTX-2080-Ti": _card("NVIDIA GeForce RTX 2080 Ti", _mib(11019), (7, 5), 68, 5.5),
    "A100-40GB": _card("NVIDIA A100-SXM4-40GB", _mib(40536), (8, 0), 108, 40),
    "A100-80GB": _card("NVIDIA A100-SXM4-80GB", _gib(79.15), (8, 0), 108, 40),
    "A10": replace(
        _card("NVIDIA A10", _mib(22587), (8, 6), 72, 6),
        source="taken to be the A10G's: the same chip and 24 GB with ECC",
    ),
    "A10G": _card("NVIDIA A10G", _mib(22587), (8, 6), 80, 6),
    "RTX-3060": _card("NVIDIA GeForce RTX 3060", _mib(12044), (8, 6), 28, 2.25),
    "RTX-3090": _card("NVIDIA GeForce RTX 3090", _mib(24268), (8, 6), 82, 6),
    "RTX-4090": _card("NVIDIA GeForce RTX 4090", _gib(23.65), (8, 9), 128, 72),
    "L4": _card("NVIDIA L4", _gib(22.04), (8, 9), 58, 48),
    "L40S": _card("NVIDIA L40S", _mib(45589), (8, 9), 142, 96),
    "H100": _card("NVIDIA H100 80GB HBM3", _mib(81089), (9, 0), 132, 50),
    "H200": _card("NVIDIA H200", _mib(143156), (9, 0), 132, 60),
    "B200": _card("NVIDIA B200", _mib(182642), (10, 0), 148, 126),
    "RTX-5090": _card("NVIDIA GeForce RTX 5090", _gib(31.37), (12, 0), 170, 96),
}

#: Names that mean one of the cards above.
_ALIASES: Final = {
    "a100": "A100-40GB",
    "v100": "V100-16GB",
    "h10080gb": "H100",
    "2080ti": "RTX-2080-Ti",
    "3060": "RTX-3060",
    "3090": "RTX-3090",
    "4090": "RTX-4090",
    "5090": "RTX-5090",
}

#: The card of a run that names none: the one that free notebooks and most CI runners
#: with a GPU have, so that what fits here fits there.
DEFAULT_CARD: Final = "T4"

#: Most cards of one simulated machine.
MAX_CARDS: Final = 64


def find_card(text: str) -> tuple[Card, ...]:
    """Return the cards that a text describes.

    Args:
        text: A name (``T4``, ``A100-80GB``; case, spaces and hyphens do not matter),
            or a made-up card ``SIZE,cc=MAJOR.MINOR`` with ``sms=COUNT`` and
            ``name=TEXT`` if wanted; ``*N`` behind either means N such cards.

    Raises:
        CardError: The text names no card, or makes no sense.

    Example::

        assert find_card("A100-80GB*2")[1].multi_processor_count == 108
    """
    body, star, count = text.partition("*")
    number = 1
    if star:
        if not (count.strip().isascii() and count.strip().isdigit()):
            raise CardError(
                f"card {text!r}: {count!r} is no number of cards; write for example "
                "A100-80GB*2",
                value=text,
            )
        number = int(count)
        if not 1 <= number <= MAX_CARDS:
            raise CardError(
                f"card {text!r}: {number} cards; accepted are 1 to {MAX_CARDS}",
                value=text,
            )
    body = body.strip()
    card = _named(body) or (_made_up(text, body) if _is_size(body) else None)
    if card is None:
        raise _unknown(text, body)
    return (card,) * number


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia")


def _named(body: str) -> Card | None:
    names = {_plain(name): card for name, card in CARDS.items()}
    names.update({alias: CARDS[name] for alias, name in _ALIASES.items()})
    return names.get(_plain(body))


def _is_size(body: str) -> bool:
    return re.match(r"[0-9.]+\s*[A-Za-z]*\s*(,|$)", body) is not None


def _made_up(text: str, body: str) -> Card:
    size, *options = (part.strip() for part in body.split(","))
    try:
        total_bytes = parse_size(size)
    except SizeError as error:
        raise CardError(f"card {text!r}: {error}", value=text) from None
    card = Card(f"Simulated {size}", total_bytes, (8, 0), 108)
    seen = set()
    for option in options:
        key, _equals, value = (part.strip() for part in option.partition("="))
        if key in seen:
            raise CardError(f"card {text!r}: {key!r} is given twice", value=text)
        seen.add(key)
        card = _with_option(card, key, value, text)
    if "cc" not in seen:
        raise CardError(
            f"card {text!r} has no compute capability; write for example "
            f"{size},cc=8.0",
            value=text,
        )
    return card


def _with_option(card: Card, key: str, value: str, text: str) -> Card:
    if key == "cc":
        match = re.fullmatch(r"([0-9]{1,2})\.([0-9])", value)
        if match is None:
            raise CardError(
                f"card {text!r}: cc={value!r} is no compute capability such as 8.0",
                value=text,
            )
        return replace(card, compute_capability=(int(match[1]), int(match[2])))
    if key == "sms":
        if not (value.isascii() and value.isdigit() and int(value)):
            raise CardError(
                f"card {text!r}: sms={value!r} is no number of multiprocessors",
                value=text,
            )
        return replace(card, multi_processor_count=int(value))
    if key == "name" and value:
        return replace(card, name=value)
    raise CardError(
        f"card {text!r}: no option {key!r}; accepted are cc=8.0, sms=108, name=TEXT",
        value=text,
    )


def _unknown(text: str, body: str) -> CardError:
    close = difflib.get_close_matches(body.upper(), list(CARDS), n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    return CardError(
        f"card {text!r} is not known{hint} Known are {', '.join(CARDS)}; a made-up "
        "card is written 16GiB,cc=8.0",
        value=text,
    )
