"""What a run finds and leaves: bytes, threads, torch's settings."""

from __future__ import annotations

import gc
import logging
import operator
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from pytest_gpumem import active_device
from pytest_gpumem.devices.default_device import clear_default_device
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments import surroundings
from pytest_gpumem.instruments.surroundings import (
    Defaults,
    RandomState,
    frozen_heap,
    num_ooms,
    settle,
    wait_for_threads,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
#: Seconds that no test should ever wait.
_LONG_S = 60.0


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        yield


def _take(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cuda")


def _log_an_error(nbytes: int) -> None:
    held = _take(nbytes)
    try:
        int(f"{held.nbytes} bytes")
    except ValueError:
        logging.getLogger("loader").exception("cannot load")


def test_what_is_left_is_weighed_against_what_was_there() -> None:
    """Bytes of before are nobody's leak, and freeing some of them is less than none."""
    before = _take(6 * MIB)
    start_bytes = before.nbytes

    assert settle(active_device(), start_bytes) == (0, 0)
    left = _take(2 * MIB)
    assert settle(active_device(), start_bytes) == (left.nbytes, 0)
    del before, left
    assert settle(active_device(), start_bytes) == (-start_bytes, 0)


def test_log_records_are_told_from_what_the_code_has_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Pytest's log capture keeps the frames of a logged error; they are let go."""
    before, left = _take(6 * MIB), _take(2 * MIB)
    _log_an_error(4 * MIB)

    found = settle(active_device(), before.nbytes)

    assert found == (left.nbytes, 4 * MIB)
    assert caplog.records[0].exc_info is not None
    assert settle(active_device(), before.nbytes) == (left.nbytes, 0)


def test_regions_of_autocast_are_left() -> None:
    """A region that was never left would keep the casts of weights for good."""
    defaults = Defaults()

    torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False).__enter__()
    defaults.restore()

    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()
    assert torch.autocast_increment_nesting() == 1
    assert torch.autocast_decrement_nesting() == 0


def test_random_states_are_put_back() -> None:
    """Of Python, numpy, the host and the card."""

    def draw() -> list[float]:
        return [
            random.random(),  # noqa: S311  # what a program draws
            np.random.random(),  # noqa: NPY002  # its global state
            torch.rand(1).item(),
            torch.rand(1, device="cuda").item(),
        ]

    state = RandomState()
    first = draw()

    second = draw()
    state.restore()

    assert draw() == first
    assert all(map(operator.ne, first, second))


def test_a_thread_that_works_is_waited_for() -> None:
    """It would allocate in the next run."""
    before = set(threading.enumerate())
    thread = threading.Thread(target=time.sleep, args=(0.2,))
    thread.start()

    wait_for_threads(before, _LONG_S)

    assert not thread.is_alive()


def test_a_thread_that_never_ends_is_waited_for_so_long_only() -> None:
    """A program may keep a thread for good."""
    before, end = set(threading.enumerate()), threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    started_s = time.monotonic()

    wait_for_threads(before, 0.1)
    waited_s = time.monotonic() - started_s
    end.set()
    thread.join()

    assert 0.1 <= waited_s < _LONG_S


def test_threads_of_before_and_idle_ones_of_a_pool_are_not_waited_for() -> None:
    """A pool's threads live on, and have nothing to do."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    before = set(threading.enumerate())
    started_s = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        wait_for_threads(before, _LONG_S)
        waited_s = time.monotonic() - started_s
    end.set()
    thread.join()

    assert waited_s < _LONG_S


def test_a_default_that_is_left_changed_is_told_and_put_back() -> None:
    """It is put back whatever its value; those that change no number are not told."""
    defaults = Defaults()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("cuda")
    cudnn, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False

    changed = defaults.changed()
    defaults.restore()

    assert sorted(changed) == [
        "the default device is cuda:0, and was cpu",
        "the default dtype is torch.float64, and was torch.float32",
    ]
    assert defaults.changed() == frozenset()
    assert torch.get_default_dtype() is torch.float32
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.backends.cudnn.enabled is cudnn


def test_a_default_device_is_put_back_too() -> None:
    """Code that sets the host itself changes what the program had chosen."""
    torch.set_default_device("cuda")
    defaults = Defaults()
    torch.set_default_device("cpu")

    defaults.restore()
    found = torch.get_default_device()
    clear_default_device()

    assert found == torch.device("cuda:0")


def test_a_setting_that_torch_could_not_tell_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was told it in two ways that differ; what there was is not known."""
    answers = iter([RuntimeError("two ways"), 1])
    written: list[object] = []

    def read() -> object:
        answer = next(answers)
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    setting = surroundings._Setting("a precision", read, written.append)
    monkeypatch.setattr(surroundings, "_SETTINGS", (setting,))
    Defaults().restore()

    assert [] == written


def test_hooks_of_all_modules_are_taken_away_but_for_those_of_before() -> None:
    """A module that is called later computes what it did."""
    seen: list[str] = []
    module = torch.nn.modules.module
    kept = module.register_module_forward_hook(lambda *_call: seen.append("kept"))
    defaults = Defaults()
    module.register_module_forward_hook(lambda *_call: seen.append("left"))
    module.register_module_forward_pre_hook(lambda *_call: seen.append("left"))

    changed = defaults.changed()
    defaults.restore()
    torch.nn.Identity()(torch.ones(1))
    kept.remove()

    assert [each[:34] for each in changed] == ["the set of global module hooks is "]
    assert seen == ["kept"]


@pytest.mark.usefixtures("thawed_heap")
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_heap_is_frozen_for_a_block(*, is_frozen: bool) -> None:
    """What the program has frozen itself stays frozen."""
    if is_frozen:
        gc.freeze()

    counts = [gc.get_freeze_count()]
    with frozen_heap() as thawed:
        counts.append(gc.get_freeze_count())
        with thawed():
            counts.append(gc.get_freeze_count())
    counts.append(gc.get_freeze_count())

    frozen_there = [True] * 4 if is_frozen else [False, True, False, False]
    assert frozen_there == [count > 0 for count in counts]


def test_failed_allocations_of_all_cards_count() -> None:
    """A body may run out of room on any card."""
    device = active_device()
    before = num_ooms(device)
    with pytest.raises(torch.OutOfMemoryError):
        _take(64 * 2**30)

    assert num_ooms(device) == before + 1
