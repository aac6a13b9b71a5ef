"""Budgets, recorders and injectors as context managers."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytest_gpumem import OomInjector, PeakRecorder, active_device, vram_budget
from pytest_gpumem.cards import find_card
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.machine import innermost_machine
from pytest_gpumem.errors import BudgetError, DeviceUnavailableError, SizeError
from pytest_gpumem.instruments.recorder import LimitWatch
from pytest_gpumem.instruments.sites import caller_names, current_phase
from pytest_gpumem.instruments.witness import OomWitness
from pytest_gpumem.stacks import clear_exception

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    """A simulated card of 256 MiB."""
    with simulated_device(find_card("256MiB,cc=8.0")):
        yield


def _mib(count: int) -> torch.Tensor:
    return torch.zeros(count * MIB, dtype=torch.uint8, device="cuda")


# -- budget -----------------------------------------------------------------------------


def test_a_budget_holds_inside_its_block_only() -> None:
    """Inside, more than the budget fails; afterwards the card is whole again."""
    with (
        vram_budget("32MiB") as budget,
        pytest.raises(torch.OutOfMemoryError, match=r"32\.00 MiB allowed; "),
    ):
        _mib(40)

    assert 32 * MIB == budget
    assert 40 * MIB == _mib(40).numel()


def test_a_budget_goes_with_an_error_too() -> None:
    """Whatever happens inside, the budget from before holds again."""
    device = active_device()

    with vram_budget("64MiB"):
        with pytest.raises(KeyError), vram_budget("32MiB"):
            raise KeyError
        between = device.budget(0)

    assert 64 * MIB == between
    assert device.budget(0) is None


def test_an_inner_budget_cannot_be_wider() -> None:
    """Of nested budgets the smaller one holds."""
    with vram_budget("32MiB"), vram_budget("100%") as inner:
        assert 32 * MIB == inner


@pytest.mark.parametrize(
    ("size", "error"), [("nonsense", SizeError), ("300MiB", BudgetError)]
)
def test_a_bad_budget_changes_nothing(size: str, error: type[Exception]) -> None:
    """What is not a size, or more than the card, is refused at the door."""
    with pytest.raises(error), vram_budget(size):
        raise AssertionError("unreachable: the budget was refused")

    assert active_device().budget(0) is None


@given(first=st.integers(1, 256 * MIB), second=st.integers(1, 256 * MIB))
def test_budgets_nest_inside_given(first: int, second: int) -> None:
    """The context manager works for every example of a property."""
    with vram_budget(first), vram_budget(second) as inner:
        assert min(first, second) == inner
        assert min(first, second) == torch.cuda.mem_get_info()[0]


# -- recorder ---------------------------------------------------------------------------


def test_a_recorder_knows_its_block() -> None:
    """Peak, start and end are those of the block."""
    kept = _mib(2)
    with PeakRecorder() as recorder:
        _mib(30)
        during = recorder.figures.peak_allocated_bytes
    _mib(100)

    assert 32 * MIB == during == recorder.figures.peak_allocated_bytes
    assert kept.numel() == recorder.figures.start_allocated_bytes
    assert 2 * MIB == recorder.figures.end_allocated_bytes


def test_a_recorder_counts_ooms() -> None:
    """OOMs and retries of the block are counted."""
    with PeakRecorder() as recorder, pytest.raises(torch.OutOfMemoryError):
        _mib(300)

    assert (1, 1) == (recorder.figures.num_ooms, recorder.figures.num_alloc_retries)


def test_a_recorder_must_be_entered() -> None:
    """Without a block there are no figures."""
    recorder = PeakRecorder()

    with pytest.raises(RuntimeError, match="was not entered"):
        _ = recorder.figures


def test_a_limit_watch_names_the_first_line_over() -> None:
    """The site is the user's line that went over, with the phase."""
    with LimitWatch(
        32 * MIB, metric="allocated", device_index=0, device=active_device()
    ) as watch:
        kept = [_mib(32)]
        before = watch.site
        kept.append(_mib(1))
        kept.append(_mib(1))

    assert before is None
    assert watch.site is not None
    assert "test_instruments.py" in watch.site
    assert watch.site.endswith("in _mib (other)")


@pytest.mark.parametrize(
    ("metric", "is_over"), [("allocated", False), ("reserved", True)]
)
def test_a_limit_watch_compares_its_own_metric(metric: str, *, is_over: bool) -> None:
    """Memory that is reserved and unused breaks a limit of reserved bytes only."""
    _mib(40)  # the allocator keeps the segment
    with LimitWatch(
        32 * MIB, metric=metric, device_index=0, device=active_device()
    ) as watch:
        kept = _mib(8)

    assert is_over == (watch.site is not None)
    assert 40 * MIB == torch.cuda.memory_reserved()
    assert kept.is_cuda


def test_a_broken_limit_is_described_once() -> None:
    """To the witness, with the request that went over."""
    device = active_device()
    with (
        OomWitness(device) as witness,
        LimitWatch(
            32 * MIB,
            metric="allocated",
            device_index=0,
            device=device,
            witness=witness,
        ),
    ):
        kept = [_mib(20), _mib(14), _mib(1)]

    (incident,) = witness.incidents
    assert ("limit", 14 * MIB) == (incident.kind, incident.nbytes)
    assert "the limit of 32 MiB allocated" == incident.limit
    assert 34 * MIB == incident.allocated_bytes
    assert 3 == len(kept)


# -- injector ---------------------------------------------------------------------------


def test_a_request_can_be_counted_under_the_former_name() -> None:
    """It says the new one."""
    with OomInjector("any:nth=2") as injector:
        assert not injector.fails(0, 1)
        with pytest.warns(
            DeprecationWarning, match=r"is now called OomInjector\.fails$"
        ):
            assert injector.refuses(0, 1)


def test_the_nth_allocation_fails_with_torchs_error() -> None:
    """Class, text and counters are those of a real OOM at that moment."""
    kept = _mib(30)
    with OomInjector("any:nth=2") as injector:
        first = _mib(1)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            _mib(2)
        third = _mib(3)

    assert 1 == injector.num_injected
    assert 3 == injector.num_counted
    assert str(caught.value).startswith(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of "
        "256.00 MiB of which 224.00 MiB is free. Including non-PyTorch memory, this "
        "process has 32.00 MiB memory in use. Of the allocated memory 31.00 MiB is "
    )
    assert 1 == torch.cuda.memory_stats()["num_ooms"]
    assert all(tensor.is_cuda for tensor in (kept, first, third))


def test_an_injected_oom_flushes_the_cache_first() -> None:
    """Cached segments are given back before the error, as in a real OOM."""
    _mib(30)
    cached = torch.cuda.memory_reserved()

    with OomInjector("any:nth=1"), pytest.raises(torch.OutOfMemoryError):
        _mib(1)

    assert 30 * MIB == cached
    assert 0 == torch.cuda.memory_reserved()
    assert 1 == torch.cuda.memory_stats()["num_alloc_retries"]


def test_observers_see_an_injected_oom() -> None:
    """Out-of-memory observers are called with card, segment, limit and free bytes."""
    seen: list[tuple[int, int, int, int]] = []
    attach: Any = torch._C._cuda_attach_out_of_memory_observer  # type: ignore[attr-defined]  # not on CPU builds
    attach(lambda *args: seen.append(args))

    with OomInjector("any:nth=1"), pytest.raises(torch.OutOfMemoryError):
        _mib(30)

    assert [(0, 30 * MIB, 256 * MIB, 256 * MIB)] == seen


def test_size_bounds_choose_the_request() -> None:
    """Only requests of at least so many bytes are numbered."""
    with OomInjector("any:min=2MiB,persistent") as injector:
        _mib(1)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                _mib(2)

    assert 2 == injector.num_injected


def test_a_load_is_told_from_the_rest() -> None:
    """load: counts what Module.to asks for, and nothing else."""
    with OomInjector("load:nth=2") as injector:
        _mib(1)
        with pytest.raises(torch.OutOfMemoryError):
            nn.Linear(4, 4).to("cuda")
        _mib(1)

    assert 2 == injector.num_counted


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_every_phase_of_training_can_fail(phase: str) -> None:
    """A rule for a phase fails in that phase of a training step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = torch.ones(2, 4, device="cuda")
    reached = []

    def step() -> None:
        reached.append("forward")
        loss = model(inputs).sum()
        reached.append("backward")
        loss.backward()
        reached.append("optimizer")
        optimizer.step()

    with OomInjector(f"{phase}:nth=1"), pytest.raises(torch.OutOfMemoryError):
        step()

    assert phase == reached[-1]


def test_worker_threads_are_reached() -> None:
    """An allocation in a thread pool is counted and can fail."""
    with OomInjector("any:nth=2") as injector, ThreadPoolExecutor(1) as pool:
        pool.submit(_mib, 1).result()
        with pytest.raises(torch.OutOfMemoryError):
            pool.submit(_mib, 1).result()

    assert 1 == injector.num_injected


def test_a_rule_may_ask_for_a_thread_and_a_place() -> None:
    """Of both threads and both functions it fails the one in question."""

    def wanted() -> torch.Tensor:
        return _mib(1)

    rule = "any:thread=other,site=*:wanted,persistent"
    with OomInjector(rule) as injector, ThreadPoolExecutor(1) as pool:
        wanted()
        pool.submit(_mib, 1).result()
        failed = pool.submit(wanted).exception()

    assert isinstance(failed, torch.OutOfMemoryError)
    assert 1 == injector.num_injected


def test_a_place_is_named_by_the_programs_own_functions() -> None:
    """A rule's pattern cannot match torch's functions, through which every call goes."""
    seen: list[str] = []

    class Layer(nn.Module):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            seen.extend(caller_names())
            return batch

    Layer()(torch.ones(1))

    assert "test_instruments.py:forward" in seen
    assert "Layer" == seen[-1]
    assert [] == [each for each in seen if "_call_impl" in each]


@pytest.mark.parametrize(
    ("file", "is_loader"),
    [("transformers/a.py", True), ("accelerate/a.py", True), ("other/a.py", False)],
)
def test_a_loaders_parameter_is_a_place(file: str, *, is_loader: bool) -> None:
    """The variables of other libraries may mean anything."""
    code = "def load(names):\n    param_name = 'encoder.weight'\n    return names()"
    space: dict[str, Any] = {}
    exec(compile(code, f"/lib/{file}", "exec"), space)  # noqa: S102  # a loader's file

    names = space["load"](caller_names)

    assert "a.py:load" in names
    assert is_loader == ("encoder.weight" in names)


def test_rules_can_be_armed_and_dropped_inside() -> None:
    """arm() counts from that moment; disarm() ends it."""
    with OomInjector() as injector:
        _mib(1)
        injector.arm("any:nth=1")
        with pytest.raises(torch.OutOfMemoryError):
            _mib(1)
        injector.arm("any:persistent")
        injector.disarm()
        _mib(1)


def test_a_rule_that_is_armed_after_the_block_fails_nothing() -> None:
    """Only a block is under test."""
    with OomInjector() as injector:
        pass
    injector.arm("any:persistent")

    _mib(1)

    assert 0 == injector.num_injected


def test_only_an_armed_injector_is_asked() -> None:
    """Else the device knows of none: on a real card, asking has its price."""
    machine = innermost_machine()
    assert machine is not None
    faults = machine.cards[0].faults
    with OomInjector() as injector:
        before = len(faults)
        injector.arm("any:nth=5")
        injector.arm("any:nth=6")
        armed = len(faults)
        injector.disarm()
        dropped = len(faults)
        injector.arm("any:nth=1")
        with pytest.raises(torch.OutOfMemoryError):
            _mib(1)

    assert (0, 1, 0, 0) == (before, armed, dropped, len(faults))


def test_nothing_fails_after_the_block() -> None:
    """Leaving the block disarms, also when it ends with an error."""
    with pytest.raises(KeyError), OomInjector("any:persistent"):
        raise KeyError

    assert 1 * MIB == _mib(1).numel()


def test_a_phase_is_read_off_the_stack() -> None:
    """Outside torch's entry points the phase is "other"."""
    assert "other" == current_phase(sys._getframe())


# -- frames -----------------------------------------------------------------------------


def test_a_cleared_exception_lets_its_tensors_go() -> None:
    """Locals of every frame and of chained errors are freed, also after a look."""

    def inner() -> None:
        kept = _mib(20)
        raise KeyError(kept.numel())

    def outer() -> None:
        kept = _mib(10)
        try:
            inner()
        except KeyError as error:
            raise ValueError(kept.numel()) from error

    try:
        outer()
    except ValueError as error:
        caught: BaseException = error
    trace = caught.__traceback__
    while trace is not None:
        _ = trace.tb_frame.f_locals
        del _
        trace = trace.tb_next
    before = torch.cuda.memory_allocated()

    clear_exception(caught)

    assert 30 * MIB == before
    assert 0 == torch.cuda.memory_allocated()
    assert "10485760" == str(caught)


def test_without_a_device_instruments_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no card of either kind, the error says what to do."""
    from pytest_gpumem.devices.simulated import machine

    monkeypatch.setattr(machine, "_machines", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(DeviceUnavailableError, match="--gpu-backend=simulated"):
        active_device()
