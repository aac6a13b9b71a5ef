"""Any text is read, or refused by an error of the project's own; nothing else happens."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fuzzing import broken, fuzz, json_values, texts, variables
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_gpumem.allocator.config import (
    AllocatorConfig,
    config_from_environment,
)
from pytest_gpumem.allocator.versions import installed_version
from pytest_gpumem.baselines.regressions import Tolerance
from pytest_gpumem.cards import MAX_CARDS, find_card, visible_cards
from pytest_gpumem.errors import (
    AllocatorSettingError,
    CardError,
    RuleError,
    SizeError,
    SweepError,
)
from pytest_gpumem.inheritance import CHILDREN_VARIABLE, Inheritance, pass_budget_on
from pytest_gpumem.plugin.settings import (
    OPTIONS,
    parse_points,
    parse_report,
    parse_seconds,
    parse_suggest,
)
from pytest_gpumem.rules.parser import KEYS, parse_rule
from pytest_gpumem.rules.rule import FLAVOURS, PHASES, Rule
from pytest_gpumem.sizes import (
    MAX_BYTES,
    UNITS,
    format_size,
    parse_device_sizes,
    parse_size,
    parse_size_spec,
)
from pytest_gpumem.sweeps.plan import SweepPlan

_sizes = st.one_of(
    texts,
    st.from_regex(
        r"-?[0-9]{1,30}(\.[0-9]{0,5})? ?([kKmMgGtT]?[iI]?[bB]?|%)", fullmatch=True
    ),
    st.builds("{}{}".format, st.integers(), st.sampled_from([*UNITS, "%", ""])),
)


@fuzz
@given(value=_sizes | st.integers() | json_values, allow_zero=st.booleans())
def test_a_size_is_read_or_refused(value: Any, *, allow_zero: bool) -> None:
    """What is read is a number of bytes that a card can have, and reads back."""
    try:
        spec = parse_size_spec(value, allow_zero=allow_zero)
        nbytes = spec.resolve(2**35)
    except SizeError as error:
        assert error.value is value or error.value == value
        return

    assert (0 if allow_zero else 1) <= nbytes <= MAX_BYTES
    assert spec == parse_size_spec(spec.text, allow_zero=allow_zero)
    assert nbytes == parse_size(format_size(nbytes, exact=True), allow_zero=allow_zero)


@fuzz
@given(
    text=texts
    | st.lists(st.builds("{}={}".format, st.integers(-1, 12), _sizes)).map(",".join)
)
def test_sizes_by_card_are_read_or_refused(text: str) -> None:
    """Either one for all, or one for each card."""
    try:
        sizes = parse_device_sizes(text)
    except SizeError:
        return

    assert sizes
    assert all(index is None or 0 <= index < 10**4 for index in sizes)
    assert None not in sizes or 1 == len(sizes)


_cards = st.lists(
    st.one_of(
        texts,
        st.builds(
            "{}{}".format,
            st.sampled_from(["T4", "A100-80GB", "16GiB", "16GiB,cc=8.0", "a100", "1B"]),
            st.sampled_from(["", "*2", "*0", "*64", "*²", "*"])
            | st.builds(
                ",{}={}".format, st.sampled_from(["cc", "sms", "ctx", "name"]), texts
            ),
        ),
    ),
    max_size=3,
).map("+".join)


@fuzz
@given(text=_cards)
def test_a_card_is_read_or_refused(text: str) -> None:
    """What is read are cards with room on them."""
    try:
        cards = find_card(text)
    except CardError as error:
        assert error.value == text
        return

    assert 1 <= len(cards) <= MAX_CARDS
    assert all(card.total_bytes > card.context_bytes >= 0 for card in cards)


@fuzz
@given(
    listed=st.lists(st.integers(-2, 5).map(str) | variables, max_size=4).map(",".join)
)
@example(listed="²")
@example(listed="9" * 5000)
def test_any_list_of_visible_cards_shows_some_or_none(listed: str) -> None:
    """An index that is none ends it, as on a real machine."""
    cards = find_card("T4+A100-80GB+16GiB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", listed)
        shown = visible_cards(cards)

    assert set(shown) <= set(cards)


_values = st.one_of(
    texts,
    st.integers(-1, 10**6).map(str),
    st.floats().map(repr),
    st.sampled_from(["1MiB", "50%", *FLAVOURS, "9" * 5000, "²"]),
)
_rules = st.builds(
    "{}:{}".format,
    st.sampled_from(PHASES),
    st.lists(
        st.builds("{}={}".format, st.sampled_from([*KEYS, "probability"]), _values)
        | st.just("persistent"),
        min_size=1,
        max_size=4,
    ).map(",".join),
)


@fuzz
@given(text=texts | _rules | st.builds("{}:{}".format, st.sampled_from(PHASES), texts))
def test_a_rule_is_read_or_refused(text: str) -> None:
    """What is read can be written, and means the same when it is read again."""
    try:
        rule = parse_rule(text)
    except RuleError as error:
        assert error.value == text
        assert 0 <= error.position <= len(text)
        return

    assert rule == parse_rule(str(rule))
    assert rule.describe()


@fuzz
@given(
    rule=st.builds(
        Rule,
        phase=st.sampled_from(PHASES),
        nth=st.integers(1, 10**12),
        min_bytes=st.integers(0, 2**40),
        max_bytes=st.none() | st.integers(2**40, 2**62),
        device_index=st.none() | st.integers(0, 99),
        times=st.none() | st.integers(1, 10**6),
        site=st.none() | st.from_regex(r"[^\s,](.*[^\s,])?", fullmatch=True),
        thread=st.none() | st.sampled_from(["main", "other", "pool-*"]),
        flavour=st.sampled_from(FLAVOURS),
    )
)
def test_every_rule_can_be_written(rule: Rule) -> None:
    """A rule that Python made is read from its own text."""
    if rule.site is not None and "," in rule.site:
        return  # no key of the language can hold one

    assert rule == parse_rule(str(rule))


_PLAN: dict[str, Any] = {
    "points": 3,
    "modes": ["transient"],
    "flavours": ["native", "driver"],
    "rule": "load:min=1MiB",
    "recover": True,
    "timeout_s": 2.5,
    "only": "any:nth=3",
    "shard": [0, 2],
}


@fuzz
@given(plan=broken(_PLAN).filter(lambda plan: plan.keys() <= _PLAN.keys()))
def test_a_sweeps_plan_is_taken_or_refused(plan: dict[str, Any]) -> None:
    """What is taken gives a rule for each of its points."""
    try:
        taken = SweepPlan(**plan)
    except (SweepError, RuleError):
        return

    for mode in taken.modes:
        for flavour in taken.flavours:
            rule = taken.point(3, mode, flavour).rule
            assert rule == str(parse_rule(rule))
    index, count = taken.shard
    assert 0 <= index < count


@fuzz
@given(
    text=texts
    | st.builds(
        "{}:{}".format,
        st.sampled_from(["allocated", "reserved"]),
        st.floats().map("{!r}%".format) | _sizes,
    )
)
def test_a_tolerance_is_read_or_refused(text: str) -> None:
    """What is read allows no change, and is shown as something that can be read."""
    try:
        tolerance = Tolerance.parse(text)
    except ValueError:
        return

    assert tolerance.allows(MAX_BYTES, MAX_BYTES)
    shown = Tolerance.parse(f"{tolerance.metric}:{tolerance}")
    assert shown.metric == tolerance.metric
    assert bool(shown.share) == bool(tolerance.share)


@fuzz
@given(text=texts | st.integers().map(str))
@pytest.mark.parametrize(
    "parse",
    [
        parse_points,
        parse_report,
        parse_seconds,
        parse_suggest,
        *(partial(each.value, base=Path()) for each in OPTIONS if each.choices),
    ],
)
def test_an_options_value_is_read_or_refused(parse: Any, text: str) -> None:
    """By a ValueError that names it."""
    try:
        parse(text)
    except ValueError as error:
        assert repr(text)[1:9] in str(error)


_settings = st.lists(
    st.one_of(
        variables,
        st.builds(
            "{}:{}".format,
            st.sampled_from(
                [
                    "max_split_size_mb",
                    "garbage_collection_threshold",
                    "expandable_segments",
                    "roundup_power2_divisions",
                    "large_segment_size_mb",
                    "per_process_memory_fraction",
                    "backend",
                ]
            ),
            st.one_of(
                variables,
                st.integers(-1, 10**6).map(str),
                st.floats().map(repr),
                st.sampled_from(["True", "[256:1,512:2,>:4]", "[", "[]", "[1:", "²"]),
            ),
        ),
    ),
    max_size=3,
).map(",".join)


@fuzz
@given(text=_settings)
@example(text="max_split_size_mb:²")
@example(text="roundup_power2_divisions:" + "9" * 5000)
def test_allocator_settings_are_read_or_refused(text: str) -> None:
    """As PyTorch's own are; the variable is named."""
    with pytest.MonkeyPatch.context() as patch:
        for name in installed_version().variables:
            patch.delenv(name, raising=False)
        patch.setenv(installed_version().variables[0], text)
        try:
            config = config_from_environment()
        except AllocatorSettingError as error:
            assert installed_version().variables[0] in str(error)
            assert "invalid literal" not in str(error)
            return

    assert config == AllocatorConfig.parse(config.text, installed_version())
    assert config.large_segment_size > 0


_INHERITANCE: dict[str, Any] = {
    "backend": "simulated",
    "options": {"card": "T4", "values": "computed"},
    "folder": "/tmp/x",  # noqa: S108  # nothing is written
    "budgets": {"": "1GiB", "0": "50%"},
    "rules": ["any:nth=1"],
    "visible": "1,0",
}


@fuzz
@given(
    text=texts
    | json_values.map(json.dumps)
    | broken(_INHERITANCE).map(json.dumps)
    | st.just("[" * 10**5)
    | st.just('{"backend":' * 10**5)
)
def test_what_children_take_over_is_read_or_refused(text: str) -> None:
    """What is read is written as it was; nobody else's variable is touched."""
    try:
        given_ = Inheritance.parse(text)
    except ValueError as error:
        assert CHILDREN_VARIABLE in str(error)
        return

    assert given_ == Inheritance.parse(given_.text)
    assert 2 == len(given_.indices_here("0,²", 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CHILDREN_VARIABLE, given_.text)
        pass_budget_on(1, 5)
        assert "5" == Inheritance.parse(os.environ[CHILDREN_VARIABLE]).budgets["1"]


@fuzz
@given(visible=texts, theirs=texts | st.none())
@example(visible="²", theirs=None)
@example(visible="9" * 5000, theirs=None)
def test_any_lists_of_visible_cards_are_told_apart(
    visible: str, theirs: str | None
) -> None:
    """Each card of a child has a number in the run."""
    inheritance = Inheritance(**_INHERITANCE)._replace(visible=theirs)

    indices = inheritance.indices_here(visible, 2)

    assert all(index >= 0 for index in indices)
