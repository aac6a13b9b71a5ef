"""NVML sampled over a block: what it sees, and that it lets everything else be."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem import competing_process, simulated_device, vram_budget
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.devices.nvml import Reading
from pytest_gpumem.instruments.sampler import (
    MemorySampler,
    SampledTracker,
    rest_after,
    sampled,
)
from pytest_gpumem.records.memory_figures import MemoryFigures

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("pynvml")

MIB = 2**20
GIB = 2**30
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def _cards() -> Iterator[None]:
    """Two simulated cards, with a context of 300 MiB each."""
    with simulated_device("16GiB,cc=8.0,ctx=300MiB*2"):
        yield


def _mib(count: int, card: int = 0) -> torch.Tensor:
    return torch.zeros(count * MIB, dtype=torch.uint8, device=f"cuda:{card}")


class _Told:
    """A device whose NVML says what a test wants."""

    device_count = 1

    def __init__(self, *readings: Reading) -> None:
        self.readings = list(readings)
        self.threads: set[int] = set()
        self.asked_often = threading.Event()
        self.num_asked = 0

    def counted(self, _index: int) -> Reading:
        self.threads.add(threading.get_ident())
        self.num_asked += 1
        if self.num_asked >= 5:
            self.asked_often.set()
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]


def test_the_most_of_every_sample_is_kept() -> None:
    """The context counts, and so do others on the card; each card has its own."""
    with MemorySampler() as sampler:
        unused = sampler.peak(0)
        with competing_process("1GiB"):
            kept = _mib(20)
            sampler.sample()
        del kept
        torch.cuda.empty_cache()
        _mib(40, card=1)
    first, second = sampler.peak(0), sampler.peak(1)

    assert Reading(0, 0) == unused, "there is no context yet"
    assert Reading(320 * MIB, GIB + 320 * MIB) == first
    assert Reading(340 * MIB, 340 * MIB) == second


def test_a_budget_is_nobodys_memory() -> None:
    """What a budget withholds is told as not free, and not counted as used."""
    with vram_budget("1GiB"), MemorySampler() as sampler:
        kept = _mib(20)

    assert 320 * MIB == sampler.peak(0).card_bytes
    assert kept.is_cuda


def test_another_machine_is_not_mistaken_for_this() -> None:
    """A card that is simulated inside the block has bytes of its own."""
    with MemorySampler() as sampler:
        kept = _mib(20)
        with simulated_device("1GiB,cc=8.0"):
            inner = _mib(400)
            sampler.sample()
            inside = sampler.peak(0)
            del inner
    peak = sampler.peak(0)

    assert "another machine is simulated" in inside.why
    assert 320 * MIB == peak.process_bytes == peak.card_bytes
    assert kept.is_cuda


def test_a_thread_samples() -> None:
    """Without any call of the block's, and no longer than the block."""
    told: Any = _Told(Reading(5, 7))
    with MemorySampler(device=told, period_s=0.001) as sampler:
        assert told.asked_often.wait(PATIENCE_S)
    after = told.num_asked

    assert 2 == len(told.threads)
    assert threading.get_ident() in told.threads
    assert Reading(5, 7) == sampler.peak(0)
    sampler.close()
    assert after == told.num_asked, "closed is closed"


@pytest.mark.parametrize(
    ("readings", "peak"),
    [
        ([Reading(5, 7), Reading(3, 9)], Reading(5, 9)),
        ([Reading(5, 7), Reading(None, None, "lost")], Reading(None, None, "lost")),
        ([Reading(None, 7, "busy"), Reading(3, 6)], Reading(3, 7)),
        ([Reading(5, 7), Reading(None, 6, "hidden")], Reading(None, 7, "hidden")),
        ([Reading(5, 7), Reading(None, None, "busy"), Reading(3, 6)], Reading(5, 7)),
    ],
)
def test_what_is_not_known_at_the_end_is_not_known(
    readings: list[Reading], peak: Reading
) -> None:
    """It may have been more; what a moment in the middle hid, the end tells."""
    device: Any = _Told(*readings)
    with MemorySampler(device=device, period_s=PATIENCE_S) as sampler:
        for _between in readings[1:-1]:
            sampler.sample()

    assert peak == sampler.peak(0)
    assert "no sample was taken" in sampler.peak(1).why


@pytest.mark.parametrize(
    ("tracked", "told", "process"),
    [
        (50, Reading(70, 90), 70),
        (50, Reading(30, 90), 50),
        (50, Reading(None, 90, "busy"), 50),
        (None, Reading(70, 90), None),
    ],
)
def test_a_tracker_takes_the_samples_in(
    tracked: int | None, told: Reading, process: int | None
) -> None:
    """The larger of both counts; what the tracker does not know stays so."""
    figures = MemoryFigures(0, 1, 40, 1, 1, 0, 0, 0, 0, 0, 10, tracked)

    class Tracker:
        def read(self) -> MemoryFigures:
            return figures

        peek = close = read

    device: Any = _Told(told)
    with MemorySampler(device=device) as sampler:
        tracker = SampledTracker(Tracker(), sampler, 0)
        seen = [tracker.read(), tracker.peek(), tracker.close()]

    for each in seen:
        assert (process, 90) == (each.peak_process_bytes, each.peak_card_bytes)
        assert 40 == each.peak_reserved_bytes


def test_trackers_of_all_cards_end_the_sampling_once() -> None:
    """Each card's figures know the samples up to the end."""
    device = active_device()
    before = threading.active_count()
    trackers = sampled(device, [device.open_tracker(index) for index in range(2)])
    during = threading.active_count()
    kept = _mib(20, card=1)
    figures = [tracker.close() for tracker in trackers]

    assert [0, 320 * MIB] == [each.peak_process_bytes for each in figures]
    assert [0, 320 * MIB] == [each.peak_card_bytes for each in figures]
    assert (before + 1, before) == (during, threading.active_count())
    assert kept.is_cuda


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_has_no_thread_beside_it() -> None:
    """A child can take the same locks; the parent goes on."""
    with MemorySampler(period_s=0.001) as sampler:
        pid = os.fork()
        if not pid:
            sampler.sample()
            os._exit(threading.active_count())
        _pid, status = os.waitpid(pid, 0)
        again = threading.active_count()

    assert 1 == os.waitstatus_to_exitcode(status)
    assert again == threading.active_count() + 1


class _SlowOnce(_Told):
    """Its first sample in the thread takes 0.2 s of the processor's time."""

    def counted(self, index: int) -> Reading:
        is_first = threading.get_ident() not in self.threads
        if is_first and self.threads:
            end_s = time.thread_time() + 0.2
            while time.thread_time() < end_s:
                pass
        return super().counted(index)


def test_one_slow_sample_does_not_blind_the_thread() -> None:
    """A garbage collection may run within any sample; the rest after it would be 20 s."""
    device: Any = _SlowOnce(Reading(1, 2))
    began_s = time.monotonic()
    with MemorySampler(device=device, period_s=0.001):
        assert device.asked_often.wait(PATIENCE_S)

    assert time.monotonic() - began_s < 15


def test_samples_cost_less_than_a_hundredth() -> None:
    """However long they take, the rest after one is a hundred times as long."""
    for spent_s in (0.0, 1e-5, 0.01, 2.0):
        rest_s = rest_after(spent_s, 0.05)
        assert rest_s >= 0.05
        assert spent_s / (spent_s + rest_s) < 0.01
