"""Converts sizes between bytes and the texts that people write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final, NoReturn

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
#: The largest size, in bytes: PyTorch counts bytes in a signed 64-bit integer.
MAX_BYTES: Final = 2**63 - 1

_IEC: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_UNITS_LOWER: Final = {name.lower(): nbytes for name, nbytes in UNITS.items()}
_SHARE: Final = ", or a share of the card (50%)"
_ACCEPTED: Final = (
    f"write bytes (1048576), IEC units (512MiB, 1.5GiB) or SI units (4GB){_SHARE}"
)
#: The length is bounded, as Python refuses to read integers of thousands of digits.
_PATTERN: Final = re.compile(
    r"\s*(?P<number>[0-9]{1,24}(?:\.[0-9]{1,24})?)\s*(?P<unit>[A-Za-z]*|%)\s*"
)
_NEGATIVE: Final = re.compile(r"\s*[-\N{MINUS SIGN}]\s*[0-9.].*", re.DOTALL)
_NOT_FINITE: Final = re.compile(r"\s*[+-]?\s*(nan|inf|infinity)\b.*", re.IGNORECASE)
#: Longer numbers and texts are not shown whole: a message is one line.
_MAX_BITS: Final = 128
_MAX_SHOWN: Final = 60
_INDEX: Final = re.compile(r"[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class SizeSpec:
    """A size that may be a percentage of a card that is not known yet.

    Attributes:
        text: As it was written.
        number: The number before the unit, exact.
        unit_bytes: Bytes of the unit; None means percent of the card.
    """

    text: str
    number: Fraction
    unit_bytes: int | None

    def resolve(self, total_bytes: int | None = None) -> int:
        """Return bytes; a fraction of a byte is dropped.

        Args:
            total_bytes: The card's bytes, for a percentage.

        Raises:
            SizeError: A percentage without a card, or the size is above zero but
                below one byte.
        """
        if self.unit_bytes is not None:
            nbytes = int(self.number * self.unit_bytes)
        elif total_bytes is None:
            _refuse(
                self.text,
                "is a share of a card, and there is none here",
                "write bytes, such as 512MiB",
            )
        else:
            nbytes = int(self.number * total_bytes / 100)
        if nbytes < 1 and self.number:
            _refuse(self.text, "is less than one byte")
        return nbytes


def parse_size_spec(value: str | int, *, allow_zero: bool = False) -> SizeSpec:
    """Read a size without knowing the card.

    Args:
        value: Bytes as an ``int``, or a text: ``4GiB``, ``4GB``, ``512 MiB``,
            ``1.5GiB``, ``50%``, ``1048576``. Units are read in any case.
        allow_zero: Whether zero is a size.

    Raises:
        SizeError: The value is not a size, negative, zero although ``allow_zero`` is
            false, more than 100 % or more than ``MAX_BYTES``.

    Example::

        assert parse_size_spec("50%").resolve(2**30) == 2**29
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        _refuse(value, "is not a size")
    if isinstance(value, int):
        _check_range(value, value, allow_zero=allow_zero)
        return SizeSpec(str(value), Fraction(value), 1)
    match = _PATTERN.fullmatch(value)
    if match is None:
        _refuse(value, _why_unreadable(value))
    number, unit = Fraction(match["number"]), match["unit"]
    if unit == "%":
        if number > 100:  # noqa: PLR2004  # percent
            _refuse(value, "is more than the whole card")
        unit_bytes = None
    elif unit:
        unit_bytes = _unit_bytes(value, unit)
    elif number.denominator != 1:
        _refuse(value, "is not a whole number of bytes")
    else:
        unit_bytes = 1
    _check_range(value, number * (unit_bytes or 1), allow_zero=allow_zero)
    return SizeSpec(value, number, unit_bytes)


def parse_size(
    value: str | int, *, of: int | None = None, allow_zero: bool = False
) -> int:
    """Return a size in bytes; a fraction of a byte is dropped.

    Args:
        value: As for ``parse_size_spec``.
        of: Bytes of the card that a percentage is taken of.
        allow_zero: Whether zero is a size.

    Raises:
        SizeError: The value is not a size, or a percentage without ``of``.

    Example::

        assert parse_size("1.5GiB") == 1610612736
    """
    try:
        return parse_size_spec(value, allow_zero=allow_zero).resolve(of)
    except SizeError as error:
        if of is not None:
            raise
        raise SizeError(str(error).removesuffix(_SHARE), value=value) from None


def parse_device_sizes(text: str) -> dict[int | None, SizeSpec]:
    """Read one size for every card, or one for each: ``4GiB``, ``0=4GiB,1=8GiB``.

    Returns:
        Sizes by device index; the key None stands for every card.

    Raises:
        SizeError: A size or an index cannot be read, or an index comes twice.

    Example::

        assert list(parse_device_sizes("0=4GiB,1=8GiB")) == [0, 1]
    """
    if "=" not in text:
        return {None: parse_size_spec(text)}
    sizes: dict[int | None, SizeSpec] = {}
    for part in text.split(","):
        index, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not _INDEX.fullmatch(index):
            raise SizeError(
                f"sizes {text!r}: {part.strip()!r} is not INDEX=SIZE; write for example "
                "0=4GiB,1=8GiB",
                value=text,
            )
        if int(index) in sizes:
            raise SizeError(
                f"sizes {text!r}: card {int(index)} comes twice; give each card one "
                "size",
                value=text,
            )
        sizes[int(index)] = parse_size_spec(size)
    return sizes


def format_size(nbytes: int, *, exact: bool = False) -> str:
    """Return a size for people: ``1.25 GiB``, ``512 B``.

    Args:
        nbytes: Bytes, of either sign.
        exact: Use the largest unit that comes out whole (``1280 MiB``, ``1025 B``),
            so that ``parse_size`` gives ``nbytes`` back. Otherwise round to two
            decimals, halves away from zero, and leave trailing zeros out.

    Example::

        assert format_size(1342177280) == "1.25 GiB"
    """
    sign, magnitude = ("-", -nbytes) if nbytes < 0 else ("", nbytes)
    if exact:
        unit = next(
            name
            for name in reversed(_IEC)
            if name == "B" or not magnitude % UNITS[name]
        )
        return f"{sign}{magnitude // UNITS[unit]} {unit}" if nbytes else "0 B"
    for unit in _IEC:
        hundredths = (magnitude * 100 + UNITS[unit] // 2) // UNITS[unit]
        # Rounding may reach the next unit: 1048575 B is 1 MiB, not 1024 KiB.
        if hundredths < 1024 * 100 or unit == _IEC[-1]:
            break
    whole, rest = divmod(hundredths, 100)
    decimals = f".{rest:02d}".rstrip("0") if rest else ""
    return f"{sign}{whole}{decimals} {unit}"


def _refuse(value: object, reason: str, advice: str = _ACCEPTED) -> NoReturn:
    # Python may refuse to print an int of many digits.
    is_huge = isinstance(value, int) and value.bit_length() > _MAX_BITS
    shown = "with very many digits" if is_huge else repr(value)
    if len(shown) > _MAX_SHOWN:
        shown = f"{shown[: _MAX_SHOWN - 4]}...'"
    raise SizeError(f"size {shown} {reason}; {advice}", value=value)


def _why_unreadable(text: str) -> str:
    if not text.strip():
        return "is empty"
    if _NEGATIVE.fullmatch(text):
        return "is negative"
    if _NOT_FINITE.fullmatch(text):
        return "is not a finite number"
    return "cannot be read"


def _unit_bytes(text: str, unit: str) -> int:
    nbytes = _UNITS_LOWER.get(unit.lower())
    if nbytes is not None:
        return nbytes
    if unit.upper() in ("K", "M", "G", "T"):
        prefix = unit.upper()
        _refuse(
            text,
            f"has the ambiguous unit {unit!r}",
            f"write {prefix}iB (powers of 1024) or {prefix}B (powers of 1000)",
        )
    _refuse(text, f"has the unknown unit {unit!r}")


def _check_range(value: object, nbytes: int | Fraction, *, allow_zero: bool) -> None:
    if nbytes < 0:
        _refuse(value, "is negative")
    if not nbytes and not allow_zero:
        _refuse(value, "is zero")
    if nbytes > MAX_BYTES:
        _refuse(value, "is more than any card has")
