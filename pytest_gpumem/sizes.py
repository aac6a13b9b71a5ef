"""Sizes as people write them, and as bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from pytest_gpumem.errors import SizeError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Bytes of each unit; IEC units are powers of 1024, SI units powers of 1000.
UNITS: Final[Mapping[str, int]] = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_UNITS_LOWER: Final = {name.lower(): nbytes for name, nbytes in UNITS.items()}
_ACCEPTED: Final = (
    "write bytes (1048576), IEC units (512MiB, 1.5GiB), SI units (4GB) or a share of "
    "the card (50%)"
)
_PATTERN: Final = re.compile(r"\s*(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*|%)\s*")


@dataclass(frozen=True, slots=True)
class SizeSpec:
    """A size that may be a share of a card not known yet.

    Attributes:
        text: As it was written.
        number: The number before the unit, exact.
        unit_bytes: Bytes of the unit; None means percent of the card.
    """

    text: str
    number: Fraction
    unit_bytes: int | None

    def resolve(self, total_bytes: int | None = None) -> int:
        """Return bytes, rounded down to a whole one.

        Args:
            total_bytes: The card's bytes, for a percentage.

        Raises:
            SizeError: A percentage without a card, or the size is below one byte.
        """
        if self.unit_bytes is not None:
            nbytes = int(self.number * self.unit_bytes)
        elif total_bytes is None:
            raise SizeError(
                f"size {self.text!r} is a share of a card, and there is none here; "
                "write bytes, such as 512MiB",
                value=self.text,
            )
        else:
            nbytes = int(self.number * total_bytes / 100)
        if nbytes < 1:
            raise SizeError(
                f"size {self.text!r} is less than one byte; {_ACCEPTED}", value=self.text
            )
        return nbytes


def parse_size_spec(value: str | int) -> SizeSpec:
    """Read a size without knowing the card.

    Args:
        value: Bytes as an ``int``, or a text: ``4GiB``, ``4GB``, ``512 MiB``,
            ``1.5GiB``, ``50%``, ``1048576``. Units are read in any case.

    Raises:
        SizeError: The value is no size, zero, negative, or more than 100 %.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise SizeError(f"size {value!r} is no size; {_ACCEPTED}", value=value)
    text = str(value)
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise SizeError(f"size {text!r} cannot be read; {_ACCEPTED}", value=value)
    number, unit = Fraction(match["number"]), match["unit"]
    if not number:
        raise SizeError(f"size {text!r} is zero; {_ACCEPTED}", value=value)
    if unit == "%":
        if number > 100:  # noqa: PLR2004  # percent
            raise SizeError(
                f"size {text!r} is more than the whole card; {_ACCEPTED}", value=value
            )
        return SizeSpec(text, number, None)
    if not unit:
        if number.denominator != 1:
            raise SizeError(
                f"size {text!r} is no whole number of bytes; {_ACCEPTED}", value=value
            )
        return SizeSpec(text, number, 1)
    unit_bytes = _UNITS_LOWER.get(unit.lower())
    if unit_bytes is None:
        hint = _ACCEPTED
        if unit.upper() in ("K", "M", "G", "T"):
            unit = unit.upper()
            hint = f"write {unit}iB (powers of 1024) or {unit}B (powers of 1000)"
        raise SizeError(
            f"size {text!r} has the unknown unit {match['unit']!r}; {hint}", value=value
        )
    return SizeSpec(text, number, unit_bytes)


def parse_size(value: str | int, *, of: int | None = None) -> int:
    """Return a size in bytes; a fraction of a byte is dropped.

    Args:
        value: As for ``parse_size_spec``.
        of: Bytes of the card that a percentage is taken of.

    Raises:
        SizeError: The value is no size, or a percentage without ``of``.

    Example::

        assert parse_size("1.5GiB") == 1610612736
    """
    return parse_size_spec(value).resolve(of)


def parse_device_sizes(text: str) -> dict[int | None, SizeSpec]:
    """Read one size for every card, or one for each: ``4GiB``, ``0=4GiB,1=8GiB``.

    Returns:
        Sizes by device index; the key None stands for every card.

    Raises:
        SizeError: A size or an index cannot be read, or an index comes twice.
    """
    if "=" not in text:
        return {None: parse_size_spec(text)}
    sizes: dict[int | None, SizeSpec] = {}
    for part in text.split(","):
        index, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not (index.isascii() and index.isdigit()):
            raise SizeError(
                f"sizes {text!r}: {part.strip()!r} is no INDEX=SIZE; write for example "
                "0=4GiB,1=8GiB",
                value=text,
            )
        if int(index) in sizes:
            raise SizeError(f"sizes {text!r}: card {index} comes twice", value=text)
        sizes[int(index)] = parse_size_spec(size)
    return sizes


def format_size(nbytes: int) -> str:
    """Return a size for people: ``1.25 GiB``, ``512 B``; two decimals at most.

    Args:
        nbytes: Bytes, of either sign.
    """
    sign, nbytes = ("-", -nbytes) if nbytes < 0 else ("", nbytes)
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if nbytes >= UNITS[unit]:
            value = f"{nbytes / UNITS[unit]:.2f}".rstrip("0").rstrip(".")
            return f"{sign}{value} {unit}"
    return f"{sign}{nbytes} B"
