"""Simulated cards: names, made-up ones, and the table behind them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pytest_gpumem.cards import (
    CARDS,
    DEFAULT_CARD,
    MAX_CARDS,
    SLICES,
    Card,
    find_card,
    gpus_of,
    uuids_of,
)
from pytest_gpumem.errors import CardError


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("T4", "T4"),
        ("t4", "T4"),
        ("Tesla T4", "T4"),
        ("RTX-4090", "RTX-4090"),
        ("rtx 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("4090", "RTX-4090"),
        ("2080ti", "RTX-2080-Ti"),
        ("a100 80gb", "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("H100", "H100"),
        ("H100-80GB", "H100"),
        ("A10", "A10"),
        ("A10G", "A10G"),
        ("L4", "L4"),
        ("L40S", "L40S"),
    ],
)
def test_a_card_is_found_by_name(text: str, key: str) -> None:
    """Case, blanks, hyphens and the maker's words do not matter."""
    assert find_card(text) == (CARDS[key],)


@pytest.mark.parametrize("key", [*CARDS, *SLICES])
def test_every_card_is_found_by_its_key_and_by_the_drivers_name(key: str) -> None:
    """No two rows of the table share a name, but for the Jetson Orin modules."""
    card = (CARDS | SLICES)[key]

    assert find_card(key) == (card,)
    if card.name == "Orin":
        with pytest.raises(CardError, match="'Orin' comes in several sizes; write Jet"):
            find_card(card.name)
    else:
        assert find_card(card.name) == (card,)


def test_cards_without_memory_of_their_own_share_the_hosts() -> None:
    """GB10 and the Jetson modules; a GH200 has memory of its own."""
    integrated = {key for key, card in CARDS.items() if card.is_integrated}

    assert integrated == {
        "GB10",
        "Jetson-Thor",
        "Jetson-AGX-Orin-64GB",
        "Jetson-Orin-NX-16GB",
        "Jetson-Orin-Nano-8GB",
    }
    assert all(CARDS[key].host_bytes is None for key in integrated)


def test_the_hosts_part_of_a_shared_memory_can_be_given() -> None:
    """To a card of the table, and to a made-up one, which then has no own memory."""
    (named,) = find_card("GB10,host=8GiB")
    (made_up,) = find_card("16GiB,cc=8.7,host=0")

    assert replace(CARDS["GB10"], host_bytes=8 * 2**30) == named
    assert (True, 0, "") == (
        made_up.is_integrated,
        made_up.host_bytes,
        made_up.nvml_name,
    )
    assert not find_card("16GiB,cc=8.7")[0].is_integrated
    with pytest.raises(CardError, match="host is for a card without memory of its own"):
        find_card("T4,host=1GiB")
    with pytest.raises(CardError, match="host='200GiB' leaves no room"):
        find_card("GB10,host=200GiB")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "T4:1g.5gb",
            "no slices (MIG) of T4 are known; known are those of A100-40GB, ",
        ),
        (
            "H100:9g.9gb",
            "'9g.9gb' is not a known slice (MIG) of H100; known are 1g.10gb",
        ),
        ("A100:1g.5gb", "'A100' comes in several sizes; write A100-40GB or A100-80GB"),
        ("A100-80GB:", "'' is not a known slice (MIG) of A100-80GB; known are 1g.10gb"),
    ],
)
def test_a_slice_that_is_not_known_is_refused(text: str, message: str) -> None:
    """The message lists the card's profiles, or the cards that have some."""
    with pytest.raises(CardError, match=re.escape(f"card {text!r}: {message}")):
        find_card(text)


@pytest.mark.parametrize("key", SLICES)
def test_a_slice_is_a_part_of_its_card(key: str) -> None:
    """Of its memory, its multiprocessors and its cache, with a name of its own."""
    card = SLICES[key]
    whole = CARDS[card.parent]

    assert f"{card.parent}:{card.profile}" == key
    assert f"{whole.name} MIG {card.profile}" == card.name
    assert card.compute_capability == whole.compute_capability
    assert 0 < card.total_bytes < whole.total_bytes
    assert 0 < card.multi_processor_count < whole.multi_processor_count
    assert 0 < card.l2_cache_size <= whole.l2_cache_size


def test_slices_are_on_one_gpu_as_far_as_it_has_room() -> None:
    """Seven slices of compute and eight of memory; then the next GPU begins."""
    cards = find_card(
        "T4+A100-80GB:3g.40gb*3+A100-80GB:1g.10gb+H100:1g.20gb*5+A100-80GB"
    )
    gpus = gpus_of(cards)

    assert [(0,), (1, 2), (3, 4), (5, 6, 7, 8), (9,), (10,)] == [
        each.numbers for each in gpus
    ]
    assert [False, True, True, True, True, False] == [each.is_divided for each in gpus]
    assert ["T4", *["A100-80GB"] * 2, *["H100"] * 2, "A100-80GB"] == [
        next(key for key, card in CARDS.items() if card == each.card) for each in gpus
    ]
    assert ["GPU", *["MIG"] * 9, "GPU"] == [each[:3] for each in uuids_of(cards)]
    assert len(cards) == len(set(uuids_of(cards)))
    assert [(7, 0), (8, 0), (9, 0), (10, 0)] == gpus[3].instances(cards)


def test_a_count_gives_equal_cards() -> None:
    """``A100-80GB*2`` is a machine of two such cards."""
    assert find_card("A100-80GB*2") == (CARDS["A100-80GB"],) * 2


def test_a_machine_may_have_several_kinds() -> None:
    """The cards are numbered in the order written."""
    names = [card.name for card in find_card("T4 + 3090*2")]

    assert names == ["Tesla T4", *["NVIDIA GeForce RTX 3090"] * 2]


def test_a_made_up_card_takes_what_it_is_not_told_from_its_generation() -> None:
    """A card of compute capability 8.6 is otherwise the table's RTX 3060."""
    (card,) = find_card("16GiB,cc=8.6")

    assert card == Card(
        name="Simulated GPU 16 GiB",
        total_bytes=16 * 2**30,
        compute_capability=(8, 6),
        multi_processor_count=28,
        l2_cache_size=2359296,
        given_context_bytes=0,
        precision_bytes=1,
        source="made up",
    )


def test_a_made_up_card_has_what_it_is_told() -> None:
    """Multiprocessors and name may be chosen."""
    (card,) = find_card("1.5GiB, cc=9.0, sms=7, name=Little One")

    assert (card.name, card.total_bytes) == ("Little One", 1610612736)
    assert (card.compute_capability, card.multi_processor_count) == ((9, 0), 7)


def test_made_up_cards_may_be_several() -> None:
    """The count goes behind the last key."""
    assert [card.total_bytes for card in find_card("1GiB,cc=8.6*2")] == [2**30] * 2


@pytest.mark.parametrize("text", ["16GiB", "17179869184", "16 GiB", "16gib"])
def test_a_size_alone_is_a_card_of_compute_capability_8_0(text: str) -> None:
    """The shortest made-up card is a size."""
    (card,) = find_card(text)

    assert (card.total_bytes, card.compute_capability) == (2**34, (8, 0))


def test_a_compute_capability_off_the_table_takes_the_limits_below_it() -> None:
    """An 8.7 has the threads of an 8.6 and says that it is an 8.7."""
    (card,) = find_card("16GiB,cc=8.7")

    assert card.compute_capability == (8, 7)
    assert card.max_threads_per_multi_processor == 1536


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "V100",
            "'V100' comes in several sizes; write V100-16GB or V100-32GB",
        ),
        (
            "3085",
            (
                "'3085' is not a known card; did you mean RTX-3080 or RTX-5080 "
                f"or RTX-4080? Known are {', '.join(CARDS)}"
            ),
        ),
        (
            "T4*0",
            "'0' is not a number of cards; write for example T4*2",
        ),
        (
            "T4*",
            "'' is not a number of cards; write for example T4*2",
        ),
        ("T4*65", "65 cards; at most 64 can be simulated"),
        (
            "4G",
            (
                "size '4G' has the ambiguous unit 'G'; write GiB (powers of "
                "1024) or GB (powers of 1000)"
            ),
        ),
        (
            "50%,cc=8.0",
            (
                "size '50%' is a share of a card, and there is none "
                "here; write bytes, such as 512MiB"
            ),
        ),
        (
            "2097151B",
            (
                "'2097151B' is too small for one segment of the "
                "allocator; give at least 2 MiB"
            ),
        ),
        (
            "16GiB,cc=8",
            (
                "cc='8' is not a compute capability; give MAJOR.MINOR "
                "from 3.7 on, such as 8.0"
            ),
        ),
        (
            "16GiB,cc=3.5",
            (
                "cc='3.5' is not a compute capability; give MAJOR.MINOR "
                "from 3.7 on, such as 8.0"
            ),
        ),
        (
            "16GiB,cc=8.0,sms=0",
            "sms='0' is not a count; give 1 to 9999",
        ),
        (
            "16GiB,cc=8.0,cc=8.6",
            (
                "'cc=8.6' is not KEY=VALUE; keys, each at most once: cc, sms, ctx, nccl, host, name"
            ),
        ),
        (
            "16GiB,colour=red",
            (
                "'colour=red' is not KEY=VALUE; keys, each at most once: cc, sms, ctx, nccl, host, name"
            ),
        ),
        (
            "T4+",
            (
                "a card is missing; write a name (T4, A100-80GB), a made-up "
                "card (16GiB,cc=8.0), several of one (A100-80GB*2) or several kinds "
                "(T4+A100-80GB)"
            ),
        ),
    ],
)
def test_what_is_no_card_is_refused_with_advice(text: str, message: str) -> None:
    """The message says what was given, why it is no card, and what to write."""
    with pytest.raises(CardError, match=f"^{re.escape(f'card {text!r}: {message}')}$"):
        find_card(text)


def test_a_name_like_no_other_is_answered_with_the_whole_list() -> None:
    """Where nothing is close, all names and the grammar are shown."""
    with pytest.raises(CardError) as caught:
        find_card("Voodoo")

    assert caught.value.value == "Voodoo"
    assert ", ".join(CARDS) in str(caught.value)


def test_as_many_cards_as_can_be_simulated_are_accepted() -> None:
    """The limit is inclusive."""
    assert len(find_card(f"2MiB*{MAX_CARDS}")) == 64


def test_the_default_card_is_a_t4() -> None:
    """It is the card of free notebooks, its total known to the byte."""
    (card,) = find_card(DEFAULT_CARD)

    assert (card.name, card.total_bytes) == ("Tesla T4", 15642329088)


def test_the_table_has_the_kepler_card_of_the_oldest_reports() -> None:
    """A K80 shows 11.17 GiB."""
    card = CARDS["K80"]

    assert (card.total_bytes, card.compute_capability) == (11996954624, (3, 7))
    assert card.regs_per_multiprocessor == 131072


@pytest.mark.parametrize("key", CARDS)
def test_every_figure_of_the_table_has_a_source_and_a_precision(key: str) -> None:
    """A total known in whole MiB says so, and is a whole number of MiB."""
    card = CARDS[key]

    assert card.source
    assert card.precision_bytes in (1, 2**20, round(0.01 * 2**30))
    assert card.precision_bytes != 2**20 or card.total_bytes % 2**20 == 0


def test_a_card_of_the_table_has_the_modelled_context() -> None:
    """36 MiB and 2.18 MiB for 1,024 threads: a T4 has 40 times 1,024."""
    (card,) = find_card("T4")

    assert 123 * 2**20 == card.context_bytes


@pytest.mark.parametrize(("text", "mib"), [("0", 0), ("135MiB", 135)])
def test_a_card_of_the_table_takes_a_context_that_is_given(text: str, mib: int) -> None:
    """All else stays the table's."""
    (card,) = find_card(f"rtx 4090, ctx={text}")

    assert mib * 2**20 == card.context_bytes
    assert card == replace(CARDS["RTX-4090"], given_context_bytes=mib * 2**20)


@pytest.mark.parametrize("pair", ["cc=8.0", "sms=4", "name=mine"])
def test_what_a_card_of_the_table_is_cannot_be_changed(pair: str) -> None:
    """The message says how to have such a card."""
    key = pair.partition("=")[0]
    with pytest.raises(CardError, match=f"{key} is fixed .* make a card up: 16GiB,"):
        find_card(f"T4,{pair}")


@pytest.mark.parametrize(
    ("key", "figures"),
    [
        ("T4", (1024, 65536, 49152, 65536, 65536)),
        ("A100-40GB", (2048, 65536, 49152, 166912, 167936)),
        ("RTX-4090", (1536, 65536, 49152, 101376, 102400)),
        ("H100", (2048, 65536, 49152, 232448, 233472)),
    ],
)
def test_a_card_has_the_limits_of_its_compute_capability(
    key: str, figures: tuple[int, ...]
) -> None:
    """Threads, registers and shared memory are as the CUDA guide's table has them."""
    card = CARDS[key]

    assert (
        card.max_threads_per_multi_processor,
        card.regs_per_multiprocessor,
        card.shared_memory_per_block,
        card.shared_memory_per_block_optin,
        card.shared_memory_per_multiprocessor,
    ) == figures


@pytest.mark.parametrize("context", ["16GiB", "17GiB"])
def test_a_context_leaves_room_on_its_card(context: str) -> None:
    """Neither all of it nor more; one byte less is a card."""
    with pytest.raises(CardError, match="leaves no room on the card"):
        find_card(f"16GiB,ctx={context}")

    (card,) = find_card(f"16GiB,ctx={2**34 - 1}")
    assert 2**34 - 1 == card.context_bytes


@pytest.mark.parametrize("capability", ["x", "0.0", "1.0", "80"])
def test_a_capability_below_every_card_is_refused(capability: str) -> None:
    """The lowest of the table is named."""
    with pytest.raises(CardError, match="not a compute capability; give"):
        find_card(f"16GiB,cc={capability}")


def test_a_context_that_is_no_size_is_refused() -> None:
    """The card and the key are named."""
    with pytest.raises(CardError, match=r"card '16GiB,ctx=x': ctx: size 'x' cannot"):
        find_card("16GiB,ctx=x")
