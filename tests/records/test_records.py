"""Figures on their way through reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.records.memory import (
    MemoryFigures,
    from_properties,
    to_properties,
)

FIGURES = MemoryFigures(1, 10, 24, 9, 10, 0, 1, 2, 3, 4, 11)
_bytes = st.integers(0, 2**40)


@given(
    figures=st.builds(
        MemoryFigures,
        device_index=st.integers(0, 63),
        **dict.fromkeys(
            [
                "peak_allocated_bytes",
                "peak_reserved_bytes",
                "peak_requested_bytes",
                "peak_active_bytes",
                "start_allocated_bytes",
                "end_allocated_bytes",
                "end_reserved_bytes",
                "num_ooms",
                "num_alloc_retries",
            ],
            _bytes,
        ),
        peak_process_bytes=st.none() | _bytes,
        peak_card_bytes=st.none() | _bytes,
    ),
    phase=st.sampled_from(["setup", "call", "teardown"]),
)
def test_figures_survive_flat_properties(figures: MemoryFigures, phase: str) -> None:
    """What is flattened into properties is rebuilt the same, also from text."""
    properties = {name: str(value) for name, value in to_properties(phase, figures)}

    assert {(phase, figures.device_index): figures} == from_properties(properties)


def test_foreign_properties_are_left_alone() -> None:
    """Other plugins' properties, and incomplete ones, are no figures."""
    properties = {"gpumem.call.cuda0.num_ooms": 1, "other": "x", "gpumem.a.b.c": 2}

    assert {} == from_properties(properties)


@pytest.mark.parametrize(
    "foreign",
    [
        "gpu.call.cuda0.x",
        "zzz.call.cuda0.x",
        "gpumem.call.cuda0",
        "gpumem.call.cuda0.x.y",
        "gpumem.call.cpu0.x",
    ],
)
def test_a_name_that_is_nearly_one_of_ours_is_not(foreign: str) -> None:
    """However near; its value need be no number."""
    own = dict(to_properties("call", FIGURES))

    assert {("call", 1): FIGURES} == from_properties({**own, foreign: "x"})


def test_a_process_holds_what_is_reserved_and_its_context() -> None:
    """The largest of each metric, by its name; the driver may not tell the last."""
    metrics = ("allocated", "reserved", "process")
    known = replace(FIGURES, peak_process_bytes=24 + 11)

    assert [10, 24, None] == [FIGURES.peak(metric) for metric in metrics]
    assert [10, 24, 24 + 11] == [known.peak(metric) for metric in metrics]


def test_figures_of_another_version_are_none() -> None:
    """Neither fewer nor more than there are."""
    own = dict(to_properties("call", FIGURES))

    assert {} == from_properties({**own, "gpumem.call.cuda1.new_bytes": 3})
    own.popitem()
    assert {} == from_properties(own)
