"""Hypothesis strategies: budgets, rules and schedules of faults.

A failing example shrinks to the fewest faults, the earliest allocations and the simplest
error. This module needs Hypothesis (``pip install hypothesis``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from pytest_gpumem.rules.rule import FLAVOURS, NOT_OOM, Rule
from pytest_gpumem.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Flavours that are an OOM. Examples shrink to the first, which is the simplest.
OOMS = tuple(flavour for flavour in FLAVOURS if flavour != NOT_OOM)


def budgets(
    min_size: int | str = "2MiB", max_size: int | str = "16GiB"
) -> st.SearchStrategy[int]:
    """Return a strategy for budgets, in bytes; it shrinks to the smallest.

    Args:
        min_size: The smallest size, in bytes or as text.
        max_size: The largest size, in bytes or as text.

    Raises:
        SizeError: One of them is not a size.

    Example::

        @given(budget=budgets(max_size="1GiB"))
        def test_it(budget):
            with vram_budget(budget):
                ...
    """
    return st.integers(parse_size(min_size), parse_size(max_size))


def rules(
    *,
    phases: Sequence[str] = ("any",),
    flavours: Sequence[str] = ("native",),
    max_nth: int = 200,
    persistent: bool | None = None,
) -> st.SearchStrategy[Rule]:
    """Return a strategy for injection rules; it shrinks to the first allocation, once.

    Args:
        phases: The phases whose allocations count.
        flavours: The errors that may be raised; ``OOMS`` has all OOMs.
        max_nth: The largest number of the first failing allocation.
        persistent: Whether all later allocations fail, too; None means either.

    Example::

        @given(rule=rules(phases=["load"], flavours=OOMS))
        def test_it(rule):
            with OomInjector(rule):
                ...
    """
    times: dict[bool | None, st.SearchStrategy[int | None]] = {
        False: st.just(1),
        True: st.none(),
        None: st.sampled_from((1, None)),
    }
    return st.builds(
        Rule,
        phase=st.sampled_from(list(phases)),
        nth=st.integers(1, max_nth),
        times=times[persistent],
        flavour=st.sampled_from(list(flavours)),
    )


def schedules(
    *,
    max_faults: int = 3,
    phases: Sequence[str] = ("any",),
    flavours: Sequence[str] = ("native",),
    max_nth: int = 200,
) -> st.SearchStrategy[list[Rule]]:
    """Return a strategy for several faults of one run, each with its own allocation.

    It shrinks to the fewest faults, and to the earliest allocations.

    Args:
        max_faults: The largest number of faults; the smallest is one.
        phases: As for ``rules``.
        flavours: As for ``rules``.
        max_nth: As for ``rules``.

    Example::

        @given(faults=schedules(max_faults=2))
        def test_it(faults):
            with OomInjector(*faults):
                ...
    """
    one = rules(phases=phases, flavours=flavours, max_nth=max_nth, persistent=False)
    return st.lists(
        one,
        min_size=1,
        max_size=max_faults,
        unique_by=lambda rule: (rule.phase, rule.nth),
    )
