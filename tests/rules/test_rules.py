"""Injection rules: the language, and which requests a rule fails."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.errors import RuleError
from pytest_gpumem.rules.parser import KEYS, Key, parse_rule
from pytest_gpumem.rules.rule import FLAVOURS, PHASES, Request, Rule, Schedule


def _request(nbytes: int = 1024, *, device: int = 0, phase: str = "other") -> Request:
    return Request(nbytes=nbytes, device_index=device, phase=phase)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("any", Rule()),
        ("load:nth=3", Rule(phase="load", nth=3)),
        (
            "forward:min=64MiB,persistent",
            Rule(phase="forward", min_bytes=64 * 2**20, times=None),
        ),
        ("any:nth=2,times=4", Rule(nth=2, times=4)),
        ("any:max=1KiB,device=1", Rule(max_bytes=1024, device_index=1)),
        (" backward : nth = 2 ", Rule(phase="backward", nth=2)),
    ],
)
def test_rules_are_read(text: str, rule: Rule) -> None:
    """Phase and keys become a rule."""
    assert rule == parse_rule(text)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 0, "'' is not a phase; accepted are any, load"),
        ("lod:nth=1", 0, "'lod' is not a phase"),
        ("load:", 5, "nothing follows the colon"),
        ("load:nth=0", 9, "not a whole number from 1 on"),
        ("load:nth=x", 9, "not a whole number"),
        ("load:nth", 8, "'nth' needs a value, as in load:nth=3"),
        ("load:when=3", 5, "no key 'when'; accepted are nth"),
        ("any:nth=1,nth=2", 10, "'nth' is given twice"),
        ("any:persistent=1", 4, "'persistent' takes no value"),
        ("any:times=2,persistent", 12, "exclude each other"),
        ("any:min=64Mi", 8, "unknown unit"),
        ("any:min=2KiB,max=1KiB", 13, "'max' is below 'min'"),
        ("any:device=-1", 11, "not a whole number from 0 on"),
    ],
)
def test_mistakes_are_pointed_at(text: str, position: int, message: str) -> None:
    """The error names the mistake and puts a caret under it."""
    with pytest.raises(RuleError, match=message) as caught:
        parse_rule(text)

    assert position == caught.value.position
    assert f"\n  {' ' * position}^\n" in str(caught.value)


def test_the_nth_request_fails_once() -> None:
    """Without times or persistent, one request is refused."""
    schedule = Schedule(Rule(nth=3))

    assert [False, False, True, False, False] == [
        schedule.fails(_request()) for _ in range(5)
    ]
    assert schedule.is_spent


def test_a_persistent_rule_never_stops() -> None:
    """The nth and all later requests are refused."""
    schedule = Schedule(Rule(nth=2, times=None))

    assert [False, True, True, True] == [schedule.fails(_request()) for _ in range(4)]
    assert not schedule.is_spent


def test_only_matching_requests_are_numbered() -> None:
    """Size, device and phase decide what counts; bounds are inclusive."""
    schedule = Schedule(
        Rule(phase="load", nth=2, min_bytes=10, max_bytes=20, device_index=1)
    )
    requests = [
        _request(10, device=1, phase="load"),
        _request(9, device=1, phase="load"),
        _request(21, device=1, phase="load"),
        _request(15, device=0, phase="load"),
        _request(15, device=1, phase="forward"),
        _request(20, device=1, phase="load"),
    ]

    refused = [schedule.fails(request) for request in requests]

    assert [False] * 5 + [True] == refused
    assert 2 == schedule.num_counted


def test_threads_share_one_count() -> None:
    """However requests are spread over threads, exactly the wanted number fails."""
    schedule = Schedule(Rule(nth=100, times=50))
    failed: list[bool] = []

    def ask() -> None:
        failed.extend(schedule.fails(_request()) for _ in range(100))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert 50 == sum(failed)
    assert 400 == schedule.num_counted


_WORDS = st.text("abc*?.:_-", min_size=1, max_size=8)
_COMMON = {
    "phase": st.sampled_from(PHASES),
    "min_bytes": st.integers(0, 2**40),
    "max_bytes": st.none() | st.integers(2**40, 2**41),
    "device_index": st.none() | st.integers(0, 63),
    "times": st.none() | st.integers(1, 1000),
    "site": st.none() | _WORDS,
    "thread": st.none() | _WORDS,
    "flavour": st.sampled_from(FLAVOURS),
}


@given(
    rule=st.builds(Rule, nth=st.integers(1, 10**6), **_COMMON)
    | st.builds(Rule, after_bytes=st.integers(1, 2**40), **_COMMON)
    | st.builds(Rule, every=st.integers(1, 1000), **_COMMON)
    | st.builds(
        Rule,
        probability=st.floats(0, 1, exclude_min=True),
        seed=st.integers(0, 2**32),
        **_COMMON,
    )
)
def test_a_written_rule_reads_as_itself(rule: Rule) -> None:
    """The text of a rule is a rule of the language, and the same one."""
    assert rule == parse_rule(str(rule))


@given(text=st.text(alphabet="anyload:=,nthmi0123KiB persistent", max_size=30))
def test_any_text_is_a_rule_or_a_rule_error(text: str) -> None:
    """No text makes the parser fail in any other way."""
    try:
        position = parse_rule(text).nth - 1
    except RuleError as error:
        position = error.position

    assert 0 <= position <= max(len(text), 10**9)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_every_keys_example_is_a_rule_that_uses_it(key: Key) -> None:
    """What the docs and the errors show can be written."""
    rule = parse_rule(key.example)

    assert rule == parse_rule(str(rule))
    assert getattr(rule, key.field) != getattr(Rule(nth=2, times=2, seed=0), key.field)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("any:nth=1,every=2", 10, "'nth' and 'every' exclude each other"),
        ("any:p=0.5,after=1KiB", 10, "'p' and 'after' exclude each other"),
        ("any:every=2,persistent", 12, "'every' and 'persistent' exclude"),
        ("any:seed=3", 4, "'seed' without 'p' has no meaning"),
        ("any:p=0", 6, "not a probability above 0 and up to 1"),
        ("any:p=1.5", 6, "not a probability"),
        ("any:p=nan", 6, "not a probability"),
        ("any:p=often", 6, "'often' is not a probability"),
        ("any:flavour=cubals", 12, r"not a flavour \(did you mean cublas\?\)"),
        ("any:evry=2", 4, r"no key 'evry' \(did you mean every\?\)"),
        ("forwrd", 0, r"not a phase \(did you mean forward\?\)"),
        ("any:site=", 9, "matches nothing"),
    ],
)
def test_contradictions_are_pointed_at(text: str, position: int, message: str) -> None:
    """The later of two keys that exclude each other, and slips of the pen."""
    with pytest.raises(RuleError, match=message) as caught:
        parse_rule(text)

    assert position == caught.value.position


def _refused(rule: str, sizes: list[int]) -> list[int]:
    schedule = Schedule(parse_rule(rule))
    return [
        number
        for number, size in enumerate(sizes, start=1)
        if schedule.fails(_request(size))
    ]


def test_every_kth_fails() -> None:
    """Again and again, unless times bounds it."""
    assert [3, 6, 9] == _refused("any:every=3", [1] * 10)
    assert [3, 6] == _refused("any:every=3,times=2", [1] * 10)


def test_after_counts_bytes() -> None:
    """The request that takes the sum above the bound is the first."""
    sizes = [400, 400, 300, 10]

    assert [3] == _refused("any:after=1000", sizes)
    assert [3, 4] == _refused("any:after=1000,persistent", sizes)
    assert [4] == _refused("any:after=1109", sizes)
    assert [] == _refused("any:after=1110", sizes)


def test_probability_has_its_own_seed() -> None:
    """The same seed fails the same requests, whatever else draws numbers."""
    first = _refused("any:p=0.2,seed=7", [1] * 500)
    random.seed(1)
    again = _refused("any:probability=0.2,seed=7", [1] * 500)

    assert first == again != _refused("any:p=0.2,seed=8", [1] * 500)
    assert 60 <= len(first) <= 140


def test_threads_are_told_by_name() -> None:
    """main, other, or a pattern."""

    def asked(rule: str) -> list[str]:
        schedule = Schedule(parse_rule(rule))
        threads = ("main", "loader-0", "loader-1")
        return [
            name
            for name in threads
            if schedule.fails(Request(1, 0, "load", thread=name))
        ]

    assert ["main"] == asked("any:thread=main,persistent")
    assert ["loader-0", "loader-1"] == asked("any:thread=other,persistent")
    assert ["loader-1"] == asked("any:thread=*-1,persistent")


def test_sites_match_any_name() -> None:
    """A frame, a module's path or a parameter's name; the whole of it."""
    request = Request(
        1, 0, "load", names=("loader.py:load", "bert.embeddings", "w.bias")
    )

    for pattern in ("loader.py:*", "*embeddings*", "*.bias"):
        assert parse_rule(f"any:site={pattern}").counts(request)
    assert not parse_rule("any:site=embeddings").counts(request)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("any", "allocation number 1"),
        ("load:nth=3", "allocation number 3 in load"),
        ("any:nth=2,times=2", "allocation number 2 and the next 1"),
        ("any:nth=2,times=4", "allocation number 2 and the next 3"),
        ("any:persistent", "allocation number 1 and every later one"),
        (
            "load:min=1MiB,after=1GiB",
            "the first allocation of at least 1 MiB after 1 GiB in load",
        ),
        ("any:after=1KiB,times=2", "the first allocation after 1 KiB and the next 1"),
        ("forward:every=10", "every 10th allocation in forward"),
        ("any:p=0.25,min=512B", "allocations of at least 512 B with probability 0.25"),
    ],
)
def test_a_rule_is_described_in_words(text: str, words: str) -> None:
    """As the end of a sentence."""
    assert words == parse_rule(text).describe()


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (Rule(), "any:nth=1"),
        (Rule(times=2), "any:nth=1,times=2"),
        (Rule(times=None, min_bytes=1), "any:nth=1,min=1,persistent"),
        (Rule(every=3, times=None), "any:every=3"),
        (Rule(every=3, times=1), "any:every=3,times=1"),
        (Rule(probability=0.5, seed=7, times=None), "any:p=0.5,seed=7"),
        (
            Rule(
                "load", after_bytes=9, max_bytes=8, device_index=0, site="*", thread="x"
            ),
            "load:after=9,max=8,device=0,site=*,thread=x",
        ),
    ],
)
def test_a_rule_is_written_without_what_goes_without_saying(
    rule: Rule, text: str
) -> None:
    """Only keys that say something."""
    assert text == str(rule)


@pytest.mark.parametrize(
    ("pattern", "name", "takes"),
    [
        (None, "main", True),
        ("main", "main", True),
        ("main", "pool-1", False),
        ("other", "main", False),
        ("other", "pool-1", True),
        ("other", "a", True),
        ("pool-*", "pool-1", True),
        ("pool-*", "loader", False),
    ],
)
def test_a_rule_takes_the_threads_that_it_names(
    pattern: str | None, name: str, *, takes: bool
) -> None:
    """``other`` is any but the main one, wherever its name sorts."""
    request = Request(1024, 0, "other", thread=name)

    assert takes == Rule(thread=pattern).counts(request)
