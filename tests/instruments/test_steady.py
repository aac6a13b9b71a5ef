"""A loop that grows fails, and says what it keeps; one that does not grow passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem import simulated_device, steady
from pytest_gpumem.errors import GrowthError, SizeError

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        yield


def tensor(mib: int = 1) -> torch.Tensor:
    """Return so many MiB on the card."""
    return torch.empty(mib * MIB, dtype=torch.uint8, device="cuda")


def test_a_loop_that_keeps_nothing_passes() -> None:
    """Every step is run, and numbered."""
    assert list(range(9)) == [step for step in steady() if tensor() is not None]


def test_a_list_that_grows_is_named() -> None:
    """With what each step adds."""
    kept = []

    with pytest.raises(GrowthError) as caught:  # noqa: PT012  # the loop raises at its end
        for _step in steady(steps=8, warmup=2):
            kept.append(tensor(2))  # noqa: PERF401  # that is the fault

    text = str(caught.value)
    assert text.startswith(
        "memory grows by 2 MiB (2097152 bytes) in each step after the first 2, from "
        "6 MiB to 16 MiB in 6 steps; allowed are 0 B\n"
    )
    assert "2 MiB" in text.splitlines()[2]
    assert "kept" in text


def test_a_loss_that_keeps_its_graph_is_found() -> None:
    """The commonest leak of a training: the sum of losses, with all their graphs."""
    model = torch.nn.Linear(256, 256).to("cuda")
    total: Any = 0

    with pytest.raises(GrowthError, match="grows by"):  # noqa: PT012  # the loop raises at its end
        for _step in steady():
            total = total + model(torch.ones(64, 256, device="cuda")).square().mean()


def test_a_training_that_forgets_passes() -> None:
    """An optimiser makes its state in the first step: that is what warm-up is for."""
    model = torch.nn.Linear(256, 256).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    total = 0.0

    for _step in steady(steps=6):
        loss = model(torch.ones(64, 256, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()


@pytest.mark.parametrize(
    "kept_by_step",
    [
        [1, 1, 1, 5, 5, 5, 5, 5, 5],
        [1, 1, 1, 1, 1, 1, 1, 9, 9],
        [1, 2, 3, 1, 2, 3, 1, 2, 3],
        [9, 8, 7, 6, 5, 4, 3, 2, 1],
        [9, 1, 9, 1, 9, 1, 9, 1, 9],
    ],
)
def test_what_is_made_once_or_comes_and_goes_is_no_growth(
    kept_by_step: list[int],
) -> None:
    """A late cache, a buffer that is filled and emptied."""
    kept = None
    for step in steady(steps=9, warmup=0):
        kept = tensor(kept_by_step[step])
    assert kept is not None


def test_growth_hidden_by_swings_is_found() -> None:
    """The least of each part counts."""
    kept = []
    with pytest.raises(GrowthError, match=r"grows by 1 MiB"):  # noqa: PT012  # the loop raises at its end
        for step in steady(steps=12, warmup=0):
            kept.append(tensor())
            swing = tensor(1 + step % 2 * 10)
            del swing


def test_some_growth_may_be_allowed() -> None:
    """To the byte: at the limit it passes, below it fails."""
    kept = []
    for _step in steady(allowed="1MiB"):
        kept.append(tensor())  # noqa: PERF401  # one after the other
    with pytest.raises(GrowthError):  # noqa: PT012  # the loop raises at its end
        for _step in steady(allowed=MIB - 1):
            kept.append(tensor())  # noqa: PERF401  # one after the other


@pytest.mark.parametrize("sizes", [(2, 1, 8), (1, 8, 2), (1, 8, 8)])
def test_what_does_not_grow_all_the_while_passes(sizes: tuple[int, ...]) -> None:
    """A cache is emptied, or filled once, late."""
    held = None
    for step in steady(steps=3, warmup=0):
        held = None
        held = tensor(sizes[step])
    assert held is not None


def test_garbage_in_a_cycle_is_no_growth() -> None:
    """It is collected after each step."""
    for _step in steady():
        cycle: list[Any] = [tensor()]
        cycle.append(cycle)


@pytest.mark.parametrize(
    ("steps", "warmup", "enough"), [(2, 0, 3), (4, 2, 5), (5, -1, 3), (0, 0, 3)]
)
def test_too_few_steps_tell_nothing(steps: int, warmup: int, enough: int) -> None:
    """Said before the first step, with what is enough."""
    with pytest.raises(ValueError, match=f"steps={steps}, warmup={warmup}: ") as caught:
        next(steady(steps, warmup=warmup))

    assert str(caught.value).endswith(f"give steps={enough} or more")


def test_an_allowance_that_is_not_a_size_is_refused() -> None:
    """Before the first step."""
    with pytest.raises(SizeError):
        next(steady(allowed="much"))


def test_a_loop_that_is_left_early_is_not_judged() -> None:
    """Nothing is left behind either."""
    kept = []
    for step in steady():
        kept.append(tensor())
        if step == 7:
            break


def test_the_fixture_fails_a_test(pytester: pytest.Pytester) -> None:
    """With the same words."""
    pytester.makepyfile(
        """
        import torch

        def test_it(steady):
            kept = []
            for step in steady(steps=6):
                kept.append(torch.ones(1024, device="cuda"))
        """
    )

    result = pytester.runpytest("-p", "no:cacheprovider")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*GrowthError: memory grows by 4 KiB (4096 bytes)*"])
