"""The kept state of a sweep: whatever is in the file, the sweep goes on."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

from fuzzing import files, fuzz
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.records.codec import encode
from pytest_gpumem.records.record import Verdict
from pytest_gpumem.sweeps.report import Outcome, Point
from pytest_gpumem.sweeps.state import SweepState

if TYPE_CHECKING:
    from pathlib import Path

OUTCOME = Outcome(
    Point(1, "transient", "native", "any:nth=1", "a.py:f"), Verdict.LEAK, "x", 5, ("h",)
)


@fuzz
@given(
    content=st.lists(
        files(encode(OUTCOME)) | st.just(json.dumps(encode(OUTCOME)).encode()),
        max_size=3,
    ).map(b"\n".join),
    has_header=st.booleans(),
)
def test_a_broken_state_of_a_sweep_is_begun_anew(
    content: bytes, tmp_path: Path, *, has_header: bool
) -> None:
    """What can be read of it is used; the rest is forgotten."""
    path = tmp_path / "state.jsonl"
    header = json.dumps({"name": "s", "allocations": 1, "plan": repr("plan")}).encode()
    path.write_bytes(b"\n".join([header, content] if has_header else [content]))

    with suppress(KeyboardInterrupt), SweepState(path, "s", 1, "plan") as state:
        known = state.known(OUTCOME.point)
        state.note(OUTCOME)
        raise KeyboardInterrupt
    with SweepState(path, "s", 1, "plan") as state:
        assert OUTCOME == state.known(OUTCOME.point)

    assert known is None or known.point == OUTCOME.point
    assert not path.exists()
