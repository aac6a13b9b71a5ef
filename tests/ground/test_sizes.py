"""Sizes: what is read, what is refused, what is written."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.errors import SizeError
from pytest_gpumem.sizes import (
    MAX_BYTES,
    UNITS,
    SizeSpec,
    format_size,
    parse_device_sizes,
    parse_size,
    parse_size_spec,
)

BYTES = "write bytes (1048576), IEC units (512MiB, 1.5GiB) or SI units (4GB)"
ACCEPTED = f"{BYTES}, or a share of the card (50%)"


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        ("1048576", 1048576),
        (1048576, 1048576),
        ("1B", 1),
        ("512 MiB", 512 * 2**20),
        ("4GiB", 4 * 2**30),
        ("1.5GiB", 1610612736),
        ("2TiB", 2 * 2**40),
        ("1KiB", 1024),
        ("4GB", 4 * 10**9),
        ("1.5KB", 1500),
        ("3TB", 3 * 10**12),
        ("20MB", 20 * 10**6),
        ("  4GiB\n", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("4gb", 4 * 10**9),
        ("007B", 7),
        (str(MAX_BYTES), MAX_BYTES),
    ],
)
def test_a_size_is_read_to_the_byte(value: str | int, nbytes: int) -> None:
    """IEC units are powers of 1024, SI units of 1000, in any case of letters."""
    assert parse_size(value) == nbytes


def test_a_fraction_of_a_byte_is_dropped() -> None:
    """A third of a KiB, to four digits, is 341.2992 bytes, and so 341."""
    assert parse_size("0.3333KiB") == 341


def test_the_arithmetic_is_exact() -> None:
    """As floats, 0.1 TB times 10 would not be a whole number."""
    assert parse_size("4503599627370.497KB") == 4503599627370497


@pytest.mark.parametrize(
    ("text", "of", "nbytes"),
    [("50%", 2**30, 2**29), ("100 %", 7, 7), ("33.3%", 1000, 333), ("0.5%", 200, 1)],
)
def test_a_percentage_is_of_the_card(text: str, of: int, nbytes: int) -> None:
    """A share of the card comes to whole bytes, rounded down."""
    assert parse_size(text, of=of) == nbytes


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("10 Bananas", "has the unknown unit 'Bananas'"),
        ("100 KB of stuff", "cannot be read"),
        ("GiB", "cannot be read"),
        ("1e9", "cannot be read"),
        ("0x10", "cannot be read"),
        ("1_048_576", "cannot be read"),
        ("1,5GiB", "cannot be read"),
        (".5GiB", "cannot be read"),
        ("1.GiB", "cannot be read"),
        ("٤GiB", "cannot be read"),
        ("nan", "is not a finite number"),
        ("-inf GiB", "is not a finite number"),
        ("0", "is zero"),
        (0, "is zero"),
        ("0.0GiB", "is zero"),
        ("0%", "is zero"),
        ("-4GiB", "is negative"),
        (-1, "is negative"),
        ("1.5", "is not a whole number of bytes"),
        ("101%", "is more than the whole card"),
        (2**63, "is more than any card has"),
        ("8388608TiB", "is more than any card has"),
        (1.5, "is not a size"),
        (True, "is not a size"),
        (None, "is not a size"),
        ("0.0001KiB", "is less than one byte"),
    ],
)
def test_what_is_no_size_is_refused_with_one_sentence(
    value: str | int, reason: str
) -> None:
    """The message says what was given, what is accepted, and what to do."""
    message = f"size {value!r} {reason}; {BYTES}"
    of_a_card = f"size {value!r} {reason}; {ACCEPTED}"

    with pytest.raises(SizeError, match=f"^{re.escape(message)}$"):
        parse_size(value)
    with pytest.raises(SizeError, match=f"^{re.escape(of_a_card)}$"):
        parse_size(value, of=100)


@pytest.mark.parametrize(
    ("text", "prefix"), [("4G", "G"), ("4 k", "K"), ("4m", "M"), ("0.5T", "T")]
)
def test_a_unit_of_one_letter_is_ambiguous(text: str, prefix: str) -> None:
    """IEC and SI are kept apart, so the message asks which one is meant."""
    message = (
        f"size {text!r} has the ambiguous unit {text[-1]!r}; write {prefix}iB (powers "
        f"of 1024) or {prefix}B (powers of 1000)"
    )

    with pytest.raises(SizeError, match=f"^{re.escape(message)}$"):
        parse_size(text)


def test_a_percentage_needs_a_card() -> None:
    """Where no card is known, only bytes will do."""
    message = (
        "size '50%' is a share of a card, and there is none here; write bytes, such as "
        "512MiB"
    )

    with pytest.raises(SizeError, match=f"^{re.escape(message)}$"):
        parse_size("50%")


def test_the_error_carries_what_was_given() -> None:
    """The value is an attribute, so that a caller need not read the text."""
    with pytest.raises(SizeError) as caught:
        parse_size("4G")

    assert caught.value.value == "4G"


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "9" * 5000 + "GiB", 10**5000],
    ids=["bytes", "GiB", "int"],
)
def test_a_number_of_any_length_is_refused_in_one_short_line(value: str | int) -> None:
    """Python itself refuses to convert thousands of digits, with another error."""
    with pytest.raises(SizeError) as caught:
        parse_size(value)

    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("value", ["0", 0, "0GiB", "0%"])
def test_zero_is_a_size_where_the_caller_says_so(value: str | int) -> None:
    """A minimum of zero bytes makes sense, a budget of zero bytes does not."""
    assert parse_size(value, of=100, allow_zero=True) == 0


def test_allowing_zero_does_not_allow_less_than_a_byte() -> None:
    """A size that rounds down to nothing is a mistake, not a zero."""
    with pytest.raises(SizeError, match="less than one byte"):
        parse_size("0.1B", allow_zero=True)


def test_a_spec_is_read_before_the_card_is_known() -> None:
    """Syntax is checked at once, bytes are worked out for each card."""
    spec = parse_size_spec("50%")

    assert (spec.text, spec.resolve(1000), spec.resolve(3)) == ("50%", 500, 1)


def test_a_spec_of_bytes_does_not_depend_on_the_card() -> None:
    """Only a percentage needs the card's total."""
    spec = parse_size_spec("1KiB")

    assert spec == SizeSpec("1KiB", Fraction(1), 1024)
    assert (spec.resolve(), spec.resolve(10)) == (1024, 1024)


def test_one_size_is_for_every_card() -> None:
    """Without an index the key is None."""
    assert parse_device_sizes("4GiB") == {None: parse_size_spec("4GiB")}


def test_each_card_has_its_own_size() -> None:
    """Blanks around indices and sizes do not matter."""
    sizes = parse_device_sizes("0=4GiB, 12 = 50%")

    assert {index: spec.text for index, spec in sizes.items()} == {0: "4GiB", 12: "50%"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("0=4GiB,8GiB", "8GiB"),
        ("0=4GiB,", ""),
        ("-1=4GiB", "-1=4GiB"),
        ("cuda:0=4GiB", "cuda:0=4GiB"),
        ("99999=4GiB", "99999=4GiB"),
    ],
)
def test_a_part_that_is_no_index_and_size_is_refused(text: str, part: str) -> None:
    """The message names the part, not only the whole."""
    message = (
        f"sizes {text!r}: {part!r} is not INDEX=SIZE; write for example 0=4GiB,1=8GiB"
    )

    with pytest.raises(SizeError, match=f"^{re.escape(message)}$"):
        parse_device_sizes(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1=4GiB,01=8GiB",
            r"sizes '1=4GiB,01=8GiB': card 1 comes twice; give each card one size",
        ),
        ("0=", f"size '' is empty; {re.escape(ACCEPTED)}"),
        ("0=0GiB", f"size '0GiB' is zero; {re.escape(ACCEPTED)}"),
    ],
)
def test_a_card_has_one_size_and_it_makes_sense(text: str, message: str) -> None:
    """Each size is held to the same rules as a size alone."""
    with pytest.raises(SizeError, match=f"^{message}$"):
        parse_device_sizes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (512, "512 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1025, "1 KiB"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (1342177280, "1.25 GiB"),
        (4 * 2**30, "4 GiB"),
        (85100068864, "79.26 GiB"),
        (2**50, "1024 TiB"),
        (-(2**20), "-1 MiB"),
    ],
)
def test_a_size_is_written_for_people(nbytes: int, text: str) -> None:
    """Two decimals at most, and none that say nothing."""
    assert format_size(nbytes) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1025, "1025 B"),
        (1536, "1536 B"),
        (1342177280, "1280 MiB"),
        (4 * 2**30, "4 GiB"),
        (-1024, "-1 KiB"),
    ],
)
def test_a_size_is_written_exactly(nbytes: int, text: str) -> None:
    """The largest unit that comes out whole."""
    assert format_size(nbytes, exact=True) == text


@given(st.integers(1, MAX_BYTES))
def test_an_exact_text_reads_back_as_the_same_bytes(nbytes: int) -> None:
    """Writing and reading lose nothing."""
    assert parse_size(format_size(nbytes, exact=True)) == nbytes


@given(st.integers(1, 2**53))
def test_a_rounded_text_is_at_most_half_a_hundredth_off(nbytes: int) -> None:
    """The oracle is rational arithmetic on the text itself."""
    text = format_size(nbytes)
    number, unit = text.split()

    assert abs(Fraction(number) - Fraction(nbytes, UNITS[unit])) <= Fraction(1, 200)
    assert 1 <= Fraction(number) < 1024 or unit == "TiB"


@given(st.integers(1, 2**63 - 1), st.integers(1, 10**4))
def test_a_percentage_never_exceeds_the_card(total: int, hundredths: int) -> None:
    """The bytes are the exact share, rounded down."""
    text = f"{hundredths // 100}.{hundredths % 100:02d}%"
    share = Fraction(hundredths, 10000) * total

    if share < 1:
        with pytest.raises(SizeError):
            parse_size(text, of=total)
    else:
        assert parse_size(text, of=total) == share.__floor__() <= total


@given(st.text(max_size=20))
def test_any_text_is_a_positive_size_or_a_size_error(text: str) -> None:
    """Nothing else comes out of the parser."""
    try:
        nbytes = parse_size(text, of=2**40)
    except SizeError as error:
        assert error.value == text  # noqa: PT017  # either outcome is right
    else:
        assert 0 < nbytes <= MAX_BYTES


def test_a_long_text_is_not_shown_whole() -> None:
    """Nor less of it than fits on a line."""
    with pytest.raises(SizeError) as caught:
        parse_size("x" * 500)

    assert f"size '{'x' * 55}...' cannot be read; write bytes" in str(caught.value)
