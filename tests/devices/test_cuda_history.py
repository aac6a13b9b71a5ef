"""A real card's history of memory, read as torch tells it; without a card."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem.devices import cuda_history
from pytest_gpumem.devices.cuda_history import history_of_block

if TYPE_CHECKING:
    from collections.abc import Callable

FRAMES = [{"filename": "a.py", "line": 3, "name": "f"}]


class Torch:
    """Torch's own recording, as far as it is asked."""

    def __init__(self) -> None:
        self.is_kept = False
        self.entries: list[dict[str, Any]] = []
        self.calls: list[Any] = []

    def keep(self, enabled: str | None = "all", **options: Any) -> None:
        self.calls.append((enabled, options.get("max_entries")))
        self.is_kept = enabled is not None
        if options.get("clear_history"):
            self.entries = []

    def note(self, action: str, addr: int, size: int, *, time_us: int) -> None:
        self.entries.append(
            {
                "action": action,
                "addr": addr,
                "size": size,
                "time_us": time_us,
                "frames": FRAMES,
            }
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Torch:
    """CUDA is in use, and this is what keeps its history."""
    fake = Torch()

    def now(begin: Callable[[], None]) -> None:
        begin()

    monkeypatch.setattr(torch.cuda, "_lazy_call", now)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch._C, "_cuda_isHistoryEnabled", lambda: fake.is_kept, raising=False
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_snapshot", lambda: {"device_traces": [fake.entries]}
    )
    monkeypatch.setattr(cuda_history, "_keep", fake.keep)
    monkeypatch.setattr(time, "time_ns", lambda: 5_000_000)
    return fake


def test_changes_are_read_in_order_and_rounded(recorder: Torch) -> None:
    """Requests are rounded up to 512 bytes; a release is told when it is asked for."""
    with history_of_block() as history:
        recorder.note("segment_alloc", 0, 2**21, time_us=5000)
        recorder.note("alloc", 7, 4000, time_us=5001)
        recorder.note("free_requested", 7, 4000, time_us=5002)
        recorder.note("free_completed", 7, 4000, time_us=5003)
        recorder.note("segment_free", 0, 2**21, time_us=5004)
        (changes,) = history.read() or [[]]

    assert [
        (0, 0, 2**21),
        (7, 4096, 0),
        (7, -4096, 0),
        (0, 0, -(2**21)),
    ] == [each[:3] for each in changes]
    assert FRAMES == changes[1].frames
    assert [("all", cuda_history.ENTRIES), (None, None)] == recorder.calls


def test_a_recording_that_was_there_is_read_and_stays(recorder: Torch) -> None:
    """Only what comes after the block's beginning is told."""
    recorder.keep()
    recorder.note("alloc", 1, 512, time_us=4999)
    with history_of_block() as history:
        recorder.note("alloc", 2, 512, time_us=5000)
        (changes,) = history.read() or [[]]

    assert [2] == [each.address for each in changes]
    assert recorder.is_kept
    assert 1 == len(recorder.calls)


def test_a_program_may_end_the_recording(recorder: Torch) -> None:
    """Then there is nothing to tell, and nothing to put back."""
    with history_of_block() as history:
        recorder.keep(enabled=None)
        assert history.read() is None

    assert 2 == len(recorder.calls)


def test_what_begins_after_the_block_records_nothing(
    recorder: Torch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA was not used in it."""
    waiting: list[Callable[[], None]] = []
    monkeypatch.setattr(torch.cuda, "_lazy_call", waiting.append)
    with history_of_block() as history:
        assert history.read() is None
    waiting.pop()()

    assert [] == recorder.calls
