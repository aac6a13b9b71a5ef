"""PyTorch's own databases: each operator, module and optimiser once, on one sample.

``tox run -e databases`` takes more samples, and all types; see
``benchmarks/databases.py``. The databases are imported by the tests that need them: that
takes seconds, and they ask for the card as they are imported.
"""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest
from operator_differences import (
    CLOSE,
    DIFFERENCES,
    DIFFERS,
    EQUAL,
    RELEASE,
    Finding,
    listed,
    unused,
)

from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("A100-40GB"):
        yield


def _run(
    module: str, names: str, function: str, *args: Any, part: int = 1
) -> list[Finding]:
    """Run each entry of a database by a function, or one in so many of them.

    That is in a thread: torch's samples look at the whole stack, and pytest's is deep.
    The list of differences is of one release of torch; others have other operators.
    """
    if not version("torch").startswith(RELEASE):
        pytest.skip(f"operator_differences.py is for torch {RELEASE}")

    def run() -> list[Finding]:
        runs: Any = importlib.import_module(module)
        with importlib.import_module("operator_runs").frozen():
            return [
                found
                for name in list(getattr(runs, names))[::part]
                for found in getattr(runs, function)(name, *args)
            ]

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(run).result()


def _not_listed(findings: Iterable[Finding]) -> list[Finding]:
    return [each for each in findings if each.level != EQUAL and listed(each) is None]


def test_a_sample_gives_what_the_cpu_gives() -> None:
    """Operators in every way that they have, modules and optimisers; wrong inputs too."""
    operators = _run("operator_runs", "OPERATORS", "run_first", part=4)
    modules = _run("module_runs", "MODULES", "run_module", 1, part=3)
    optimisers = _run("module_runs", "OPTIMISERS", "run_optimiser", 2, part=2)

    assert [] == _not_listed([*operators, *modules, *optimisers])
    assert 120 < len({each.operator for each in operators})


@pytest.mark.slow
def test_every_operator_gives_what_the_cpu_gives() -> None:
    """In every way that it has, in its first type; and so do wrong inputs."""
    found = _run("operator_runs", "OPERATORS", "run_first")

    assert [] == _not_listed(found)
    assert 600 < len({each.operator for each in found})


@pytest.mark.slow
def test_every_module_gives_what_it_gives_on_the_cpu() -> None:
    """Forward and backward: moved to the card, copied there, and moved back."""
    found = _run("module_runs", "MODULES", "run_module", 1)

    assert [] == _not_listed(found)


@pytest.mark.slow
def test_every_optimiser_steps_as_on_the_cpu() -> None:
    """For loop, foreach and fused: parameters and state, after two steps."""
    found = _run("module_runs", "OPTIMISERS", "run_optimiser", 2)

    assert [] == _not_listed(found)


def test_an_entry_that_differs_no_more_is_found() -> None:
    """The list is complete in both directions."""
    entry = DIFFERENCES[0]
    name, *others = entry.operators.split()
    way = entry.ways.partition(";")[0]
    dtype = entry.types.partition(" ")[0]
    found = Finding(name, dtype, way, entry.level, 1, "")

    assert 0 == listed(found)
    assert listed(found._replace(operator="none such")) is None
    left = [name for each, name in unused([found]) if each is entry]
    assert others == left


def test_the_comparison_sees_each_kind_of_difference() -> None:
    """Place, type, shape, strides, values; rounding is no equality."""
    torch: Any = importlib.import_module("torch")
    runs: Any = importlib.import_module("operator_runs")
    host = torch.ones(2, 3)
    card = host.cuda()
    wrong = {
        "on cpu": host,
        "dtype": card.double(),
        "shape": card[:1],
        "stride": card.t().contiguous().t(),
        "requires_grad": card.clone().requires_grad_(),
        "not close": card + 1,
    }

    assert EQUAL == runs.compare(card, host).level
    assert CLOSE == runs.compare(card + 1e-6, host).level
    assert dict.fromkeys(wrong, DIFFERS) == {
        name: runs.compare(each, host).level for name, each in wrong.items()
    }
    for text, each in wrong.items():
        assert text in runs.compare(each, host).text
