"""Figures on their way through reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.model.records import (
    MemoryFigures,
    from_properties,
    to_properties,
)

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
