"""What was live at a peak, and whose it was."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_gpumem import simulated_device
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.instruments.timeline import BEFORE, MAX_POINTS, Series, Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator


class Encoder(nn.Module):
    """Layers of a kind."""

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.layer = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(3))
        self.register_buffer("scale", torch.ones(128))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Run them."""
        for each in self.layer:
            values = each(values)
        return values


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        yield


def live(timeline: Timeline) -> dict[str, int]:
    """Return what was live at the peak of the one card."""
    (card,) = timeline.result()
    assert card["peak_bytes"] == sum(each["bytes"] for each in card["live_at_peak"])
    return {each["site"]: each["bytes"] for each in card["live_at_peak"]}


#: What the first product of matrices leaves on a T4.
WORKSPACE_BYTES = 8519680
WEIGHTS = {"layer.*.weight of Encoder": 3 * 2**16, "scale of Encoder": 512}


def test_a_model_that_is_moved_names_its_parts() -> None:
    """Also after it is gone."""
    with Timeline(active_device()) as timeline:
        model = Encoder().to("cuda")
        del model

    assert WEIGHTS == live(timeline)


def test_a_model_built_on_the_card_names_its_parts() -> None:
    """Nothing is called or moved: torch tells of what modules are given."""
    with Timeline(active_device()) as timeline, torch.device("cuda"):
        model = Encoder()

    found = live(timeline)
    assert WEIGHTS.items() <= found.items()
    del model


def test_a_model_filled_in_place_names_its_parts() -> None:
    """As transformers fills one: parameters are set, one after the other."""
    with Timeline(active_device()) as timeline:
        model = Encoder().to("meta")
        for each in model.layer:
            weight = torch.zeros(128, 128, device="cuda")
            each.weight = nn.Parameter(weight)

    assert {"layer.*.weight of Encoder": 3 * 2**16} == live(timeline)


def test_a_model_that_was_there_names_its_parts_when_called() -> None:
    """What was on the card before is told apart, by owner where there is one."""
    other = torch.zeros(2**16, device="cuda")
    model = Encoder().to("cuda")
    with Timeline(active_device()) as timeline, torch.no_grad():
        values = torch.ones(512, 128, device="cuda")
        model(values)

    found = live(timeline)
    assert WEIGHTS.items() <= found.items()
    assert 2**18 == found[BEFORE]
    # Two layers' results: the one at work, and what it works on.
    assert 2 * 2**18 == sum(
        n for site, n in found.items() if site.endswith("(forward) in layer.*")
    )
    assert [WORKSPACE_BYTES] == [
        n for site, n in found.items() if site.startswith("cuBLAS workspace, first")
    ]
    del other


def test_gradients_are_told_from_weights() -> None:
    """Once an optimiser steps."""
    model = Encoder().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    with Timeline(active_device()) as timeline:
        for _ in range(2):
            model(torch.ones(1, 128, device="cuda")).sum().backward()
            optimizer.step()

    assert 3 * 2**16 == live(timeline)["gradient of layer.*.weight of Encoder"]


def test_a_step_inside_a_step_of_the_program_is_the_optimisers() -> None:
    """A trainer's own function may have the same name."""
    model = Encoder().to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())

    class Trainer:
        def step(self) -> None:
            model(torch.ones(1, 128, device="cuda")).sum().backward()
            optimizer.step()

    with Timeline(active_device()) as timeline:
        Trainer().step()
        Trainer().step()

    assert 3 * 2**16 == live(timeline)["gradient of layer.*.weight of Encoder"]


def test_an_optimisers_other_parameters_hide_no_gradient() -> None:
    """One that is part of no model, and one that has no gradient."""
    model = Encoder().to("cuda")
    alone = nn.Parameter(torch.ones(128, device="cuda"))
    model.layer[0].weight.requires_grad = False
    optimizer = torch.optim.AdamW([alone, *model.parameters()])
    with Timeline(active_device()) as timeline:
        for _ in range(2):
            model(alone[None]).sum().backward()
            optimizer.step()

    assert 2 * 2**16 == live(timeline)["gradient of layer.*.weight of Encoder"]


def test_a_comparison_that_raises_is_not_seen_by_the_program() -> None:
    """A module's class may have an __eq__ that fails; torch itself never calls it."""

    class Incomparable(nn.Module):
        __hash__ = nn.Module.__hash__

        def __eq__(self, other: object) -> bool:
            raise AssertionError(other)

    with Timeline(active_device()) as timeline:
        holder = nn.Module()
        holder.inner = Incomparable()
        holder.inner.weight = nn.Parameter(torch.zeros(128, device="cuda"))

    assert [512] == list(live(timeline).values())


def test_a_block_found_after_the_peak_makes_no_negative_group() -> None:
    """It was made in a pause, so that nobody knows that the peak was before it."""
    with Timeline(active_device()) as timeline:
        torch.zeros(2**18, device="cuda")
        with timeline.paused():
            weight = torch.zeros(2**19, device="cuda")
        holder = nn.Module()
        holder.weight = nn.Parameter(weight)

    (card,) = timeline.result()
    assert 2**20 == card["peak_bytes"]
    assert all(each["bytes"] > 0 for each in card["live_at_peak"])


def test_a_block_of_a_pause_that_is_found_later_is_no_part_of_the_peak() -> None:
    """The peak's blocks never come to more than the peak."""
    with Timeline(active_device()) as timeline:
        torch.zeros(2**18, device="cuda")
        with timeline.paused():
            weight = torch.zeros(2**16, device="cuda")
        holder = nn.Module()
        holder.weight = nn.Parameter(weight)

    assert [2**20] == list(live(timeline).values())


def test_a_training_steps_bytes_are_told_by_kind() -> None:
    """Each point of the series too, also those before an owner was found."""
    with Timeline(active_device()) as timeline:
        model = Encoder().to("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(2):
            values = torch.ones(64, 128, device="cuda")
            model(values).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        timeline.end_phase("call")

    (card,) = timeline.result()
    weights, activation = 3 * 2**16, 64 * 128 * 4
    for number, (_event, allocated, _reserved) in enumerate(card["points"]):
        assert allocated == sum(each[number] for each in card["kinds"].values())
    last = {kind: each[-1] for kind, each in card["kinds"].items()}
    # Two moments for each weight, and the step's number, which AdamW keeps on the host.
    assert (weights + 512, 2 * weights) == (last["weights"], last["optimiser"])
    assert 3 * activation == max(card["kinds"]["activations"])
    assert weights <= max(card["kinds"]["gradients"]) <= weights + 2 * activation
    # Autograd's thread has a handle of its own for products of matrices.
    assert 2 * WORKSPACE_BYTES == last["workspaces"]
    at_peak = timeline.kinds_of(0, "call")
    assert at_peak is not None
    assert card["peak_bytes"] == sum(at_peak.values())


def test_an_allocation_that_failed_is_marked() -> None:
    """Between the events around it."""
    with Timeline(active_device()) as timeline:
        kept = torch.ones(7, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**40, device="cuda")
        del kept

    (card,) = timeline.result()
    assert (2, [1]) == (card["num_events"], card["ooms"])


def test_a_short_series_is_kept_whole() -> None:
    """Each event once, with its number; without an event there is no point."""
    series = Series()
    before = series.points
    for allocated in (3, 1, 2):
        series.add(allocated, 5)

    assert [] == before
    assert [(1, 3, 5), (2, 1, 5), (3, 2, 5)] == series.points


def test_merged_points_keep_the_most_allocated_bytes() -> None:
    """Whatever is reserved there: a cache is often largest where least is in use."""
    peaks = {301: 900, 702: 950, 1503: 980}
    series = Series()
    for event in range(1, 2001):
        series.add(peaks.get(event, event % 7), 10 if event in peaks else 1000)
    points = series.points
    events = [event for event, _allocated, _reserved in points]

    assert MAX_POINTS // 2 <= len(points) <= MAX_POINTS + 2
    assert (2000, 5, 1000) == points[-1]
    # The stride is 32, so neighbours are at most two buckets apart.
    assert max(b - a for a, b in itertools.pairwise(events)) < 2 * 32
    assert {(event, bytes_, 10) for event, bytes_ in peaks.items()} <= set(points)


def test_a_timeline_keeps_no_model_alive() -> None:
    """Nor leaves it a hook behind."""
    hooks: Any = (
        nn.modules.module._global_parameter_registration_hooks
    )  # there is no other way to see them
    before = len(hooks)
    with Timeline(active_device()) as timeline:
        model = Encoder().to("cuda")
        model(torch.ones(1, 128, device="cuda"))
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        assert WORKSPACE_BYTES == torch.cuda.memory_allocated()

    assert before == len(hooks)
    assert WEIGHTS.items() <= live(timeline).items()


def test_a_part_that_is_itself_again_ends_nowhere() -> None:
    """A module that holds the one that holds it has still a name."""
    outer, inner = nn.Module(), nn.Module()
    with Timeline(active_device()) as timeline:
        outer.inner = inner
        inner._modules["outer"] = outer  # register_module would run for ever in repr
        inner.weight = nn.Parameter(torch.zeros(128, device="cuda"))

    assert {"inner.weight of Module": 512} == live(timeline)


def test_a_modules_own_comparison_is_not_called() -> None:
    """A module's class may define == and hash; what is recorded goes by identity."""
    calls = []

    class Noisy(nn.Module):
        def __eq__(self, other: object) -> bool:
            calls.append("==")
            return self is other

        def __hash__(self) -> int:
            calls.append("hash")
            return 7

    with Timeline(active_device()) as timeline:
        holder = nn.Module()
        for name in ("first", "second"):
            part = Noisy()
            part.weight = nn.Parameter(torch.zeros(128, device="cuda"))
            holder.register_module(name, part)

    assert [] == calls
    assert {"first.weight of Module", "second.weight of Module"} == set(live(timeline))


class Odd(Encoder):
    """A module that can be in no dictionary: torch can run it all the same."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = None  # type: ignore[assignment]  # that is the point


def test_what_cannot_be_named_is_recorded_all_the_same() -> None:
    """And nothing of it reaches the code that is recorded."""
    with Timeline(active_device()) as timeline:
        holder = nn.Module()
        holder.weight = nn.UninitializedParameter()
        with torch.no_grad():
            Odd.forward(built(), torch.ones(1, 128, device="cuda"))

    (card,) = timeline.result()
    assert card["peak_bytes"] == sum(each["bytes"] for each in card["live_at_peak"])


def built() -> Odd:
    """Return an odd model on the card; not even ``to`` takes it."""
    odd = Odd()
    for each in odd.layer:
        each.to("cuda")
    return odd
