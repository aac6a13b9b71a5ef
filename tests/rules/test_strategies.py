"""Strategies: what they make, and how a failing schedule shrinks and is replayed."""

from __future__ import annotations

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported
from hypothesis import find, given
from ways import WORKERS

from pytest_gpumem.rules.parser import parse_rule
from pytest_gpumem.rules.rule import Rule
from pytest_gpumem.strategies import OOMS, budgets, rules, schedules

pytest_plugins = ["pytester"]


@given(rule=rules(phases=["load", "forward"], flavours=OOMS, max_nth=9))
def test_rules_are_of_the_language(rule: Rule) -> None:
    """Each can be written and read, and keeps to what was asked for."""
    assert rule == parse_rule(str(rule))
    assert rule.phase in ("load", "forward")
    assert 1 <= rule.nth <= 9
    assert rule.flavour != "not-oom"


@given(budget=budgets("4MiB", "1GiB"))
def test_budgets_keep_to_their_bounds(budget: int) -> None:
    """Inclusive, in bytes."""
    assert 4 * 2**20 <= budget <= 2**30


@given(faults=schedules(max_faults=3))
def test_schedules_have_each_allocation_once(faults: list[Rule]) -> None:
    """One to three faults at different allocations."""
    assert 1 <= len(faults) <= 3
    assert len({rule.nth for rule in faults}) == len(faults)


def test_schedules_shrink_to_the_fewest_and_earliest_faults() -> None:
    """A failure that needs any fault from the fifth on is found with that one alone."""
    smallest = find(
        schedules(flavours=OOMS), lambda faults: any(rule.nth >= 5 for rule in faults)
    )

    assert [Rule(nth=5)] == smallest


@pytest.mark.parametrize("workers", WORKERS)
def test_a_failing_schedule_is_shrunk_and_replayed(
    pytester: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    """Inside @given, with workers or without; the example database has it next time."""
    pytester.makepyfile(
        """
        import torch
        from hypothesis import given, settings
        from hypothesis.database import DirectoryBasedExampleDatabase
        from pytest_gpumem import OomInjector
        from pytest_gpumem.strategies import schedules

        RUNS = []

        def work():
            kept = torch.ones(1, device="cuda")
            try:
                return torch.ones(2, device="cuda").sum().item()
            except torch.OutOfMemoryError:
                return None  # the bug: an OOM of the second allocation is lost

        # Said here, since Hypothesis has none where it believes itself in CI.
        examples = DirectoryBasedExampleDatabase(".hypothesis/examples")

        @settings(deadline=None, database=examples, derandomize=False)
        @given(faults=schedules(max_faults=3, max_nth=6))
        def test_it(faults):
            RUNS.append(faults)
            with OomInjector(*faults):
                try:
                    result = work()
                except torch.OutOfMemoryError:
                    return
            print("runs", len(RUNS))
            assert result == 2
        """
    )
    first = pytester.runpytest(*workers)
    second = pytester.runpytest(*workers)

    for result in (first, second):
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*Rule(*nth=2*"])
    assert (pytester.path / ".hypothesis" / "examples").is_dir()
