"""The moment in which memory runs out: what is seen, said and advised."""

from __future__ import annotations

import gc
import pickle
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._dynamo  # an inner run of another file must not import it first
from torch.cuda import _memory_viz

from pytest_gpumem.cards import CARDS
from pytest_gpumem.devices.simulated.device import SimulatedDevice
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments.injector import OomInjector
from pytest_gpumem.instruments.snapshots import (
    history_kept,
    snapshot_name,
    take_snapshot,
    write_snapshot,
)
from pytest_gpumem.instruments.witness import OomWitness
from pytest_gpumem.records.incidents import Incident, ModelSize, Process, remedies
from pytest_gpumem.reports.oom_section import section_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
KEPT: list[torch.Tensor] = []


@pytest.fixture
def witness() -> Iterator[OomWitness]:
    """A watched T4 with a budget of 24 MiB."""
    with simulated_device("T4") as machine:
        machine.cards[0].set_budget(24 * MIB)
        with OomWitness(SimulatedDevice(machine)) as witness:
            yield witness
        KEPT.clear()
        gc.collect()


def _take(mib: int) -> torch.Tensor:
    return torch.zeros(mib * MIB, dtype=torch.uint8, device="cuda")


def _fail(mib: int = 100) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        _take(mib)


def _owners(incident: Incident) -> dict[str, str]:
    return {each.owner.partition(" (")[0]: each.what for each in incident.tensors}


def test_the_room_is_what_the_programs_own_fraction_leaves() -> None:
    """The card's total, less what others hold, or a share of it."""
    with simulated_device("1GiB") as machine:
        torch.cuda.set_per_process_memory_fraction(0.25)
        with OomWitness(SimulatedDevice(machine)) as witness:
            _fail(512)
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert 256 * MIB == witness.incidents[0].room_bytes
    assert witness.incidents[0].budget_bytes is None


def test_figures_are_those_of_the_moment(witness: OomWitness) -> None:
    """Not of what is live later, and the request is the one that failed."""
    kept = _take(4)
    _fail()
    del kept
    _fail(50)

    first, second = witness.incidents
    assert (4 * MIB, 20 * MIB, 100 * MIB) == (
        first.allocated_bytes,
        first.reserved_bytes,
        first.nbytes,
    )
    assert 16 * MIB == first.largest_free_bytes == first.fragmented_bytes
    assert 24 * MIB == first.budget_bytes == first.room_bytes
    assert first.site.startswith("tests/instruments/test_oom_incidents.py:")
    assert "in _take (other)" in first.site
    assert 0 == second.allocated_bytes == second.largest_free_bytes
    assert 50 * MIB == second.nbytes
    assert None is first.injected_by


def test_nothing_lives_longer_for_it(witness: OomWitness) -> None:
    """What a function lets go of after an OOM is gone, though it was named."""
    seen: list[Any] = []

    def loads() -> None:
        held = _take(8)
        seen.append(weakref.ref(held.untyped_storage()))
        try:
            _take(100)
        except torch.OutOfMemoryError:
            pass
        del held
        seen.append(torch.cuda.memory_allocated())

    loads()

    assert [{"held of loads": "8388608 uint8"}] == [
        _owners(each) for each in witness.incidents
    ]
    assert 0 == seen[1]
    assert seen[0]() is None


def test_owners_have_names(witness: OomWitness) -> None:
    """Parameters, gradients, optimisers' state, variables, their members, globals."""
    witness._device.set_budget(0, 48 * MIB)
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(512, 512, bias=False)})
    model.to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = {"x": torch.ones(256, 512, device="cuda")}
    model["encoder"](batch["x"]).sum().backward()
    optimizer.step()
    KEPT.append(torch.zeros(3 * 2**16, device="cuda"))
    result = model["encoder"](batch["x"])
    _fail()

    owners = _owners(witness.incidents[0])
    assert {
        "encoder.weight of ModuleDict": "512x512 float32",
        "gradient of encoder.weight of ModuleDict": "512x512 float32",
        "momentum_buffer of SGD for encoder.weight of ModuleDict": "512x512 float32",
        "batch['x'] of test_owners_have_names": "256x512 float32",
        "KEPT[0] of module test_oom_incidents": "196608 float32",
        "result of test_owners_have_names": "256x512 float32",
    } == owners
    assert 2 * MIB == witness.incidents[0].kept_bytes
    assert result.is_cuda


def test_what_a_traceback_holds_is_named(witness: OomWitness) -> None:
    """The commonest leak of a fallback: the retry runs inside the except block."""

    def attempt() -> None:
        weights = _take(8)
        raise ValueError(weights.shape)

    try:
        attempt()
    except ValueError:
        _fail()

    (owner,) = _owners(witness.incidents[0])
    assert "weights of the traceback of ValueError in attempt" == owner


def test_a_variable_of_torchs_own_functions_is_no_owner(witness: OomWitness) -> None:
    """What only torch's call of a module holds has no name that helps."""

    class Layer(torch.nn.Module):
        def forward(self, batch: torch.Tensor) -> None:
            del batch
            _fail()

    Layer()(_take(2))

    assert {"": "2097152 uint8"} == _owners(witness.incidents[0])


def test_a_models_bytes_count_once_and_by_type(witness: OomWitness) -> None:
    """A tied weight is one weight; whole numbers would not shrink with half precision."""
    first, second = (torch.nn.Linear(8, 8, bias=False) for _ in range(2))
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    model.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
    model.to("cuda")
    _fail()

    (size,) = witness.incidents[0].models
    assert (256 + 24, 256 + 24, 256) == (
        size.whole_bytes,
        size.on_card_bytes,
        size.float32_bytes,
    )


def test_the_models_that_matter_are_listed(witness: OomWitness) -> None:
    """Those on the card, wherever they are held, and those that are about to come."""
    on_card = [torch.nn.Linear(8, 8, bias=False).to("cuda")]
    elsewhere = [torch.nn.Linear(4, 4, bias=False)]
    to_come = torch.nn.Linear(2, 2, bias=False)
    without_weights = torch.nn.Identity()
    _fail()

    sizes = witness.incidents[0].models
    assert [(16, 0), (256, 256)] == sorted(
        (each.whole_bytes, each.on_card_bytes) for each in sizes
    )
    del on_card, elsewhere, to_come, without_weights


def test_a_load_is_weighed_whole(witness: OomWitness) -> None:
    """Weights still to come count; half of them, or one layer at a time, would fit."""
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(32)))
    with pytest.raises(torch.OutOfMemoryError):
        model.to("cuda")

    incident = witness.incidents[0]
    whole = 32 * (512 * 512 + 512) * 4
    (size,) = incident.models
    assert ("Sequential", whole, whole) == (
        size.name,
        size.whole_bytes,
        size.float32_bytes,
    )
    assert whole == incident.needed_bytes
    assert re.search(r" for [0-9]+\.weight$", incident.site)
    half, offload = remedies(incident)
    assert (whole // 2, True) == (half.needed_bytes, half.fits)
    assert ((512 * 512 + 512) * 4, True) == (offload.needed_bytes, offload.fits)


@pytest.mark.parametrize("flavour", ["native", "legacy", "cublas", "driver"])
def test_an_injected_oom_names_its_rule(witness: OomWitness, flavour: str) -> None:
    """Whether or not the allocator takes part; a true one afterwards has none."""
    rule = f"any:nth=1,flavour={flavour}" if flavour != "native" else "any:nth=1"
    with OomInjector(rule), pytest.raises((torch.OutOfMemoryError, RuntimeError)):
        _take(1)
    _fail()

    assert [rule, None] == [each.injected_by for each in witness.incidents]
    lines = "\n".join(section_lines(witness.incidents[0]))
    assert f"an OOM was injected by the rule {rule} on cuda:0 (Tesla T4" in lines
    assert "needed at least" not in lines


def test_what_is_no_oom_is_not_noted(witness: OomWitness) -> None:
    """The negative control is another error; a paused witness sees nothing."""
    with OomInjector("any:nth=1,flavour=not-oom"), pytest.raises(RuntimeError):
        _take(1)
    with witness.paused():
        _fail()

    assert [] == witness.incidents
    _fail()
    assert 1 == len(witness.incidents)


def test_later_moments_are_only_counted(
    witness: OomWitness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that runs out of memory often is not slowed down for ever."""
    monkeypatch.setattr("pytest_gpumem.instruments.witness.CLOSELY", 1)
    kept = _take(1)
    _fail()
    _fail()

    assert [1, 0] == [each.num_tensors for each in witness.incidents]
    second = witness.incidents[1]
    assert "only the first 1 OOMs or broken limits" in second.note
    assert (0, 0, 0) == (
        second.seen_bytes,
        second.kept_bytes,
        second.largest_free_bytes,
    )
    assert kept.is_cuda


def test_an_oom_of_the_description_is_not_described() -> None:
    """It would be described in turn, and so on."""

    def ask_for_more(_incident: Incident) -> None:
        if len(watching.incidents) < 3:
            _fail(2048)

    with simulated_device("1GiB") as machine:
        device = SimulatedDevice(machine)
        with OomWitness(device, also=ask_for_more) as watching:
            _fail(2048)

    assert 1 == len(watching.incidents)


def test_a_card_without_figures_has_no_bytes_in_use(
    witness: OomWitness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.memory_stats is empty before CUDA is initialised (torch/cuda/memory.py)."""
    monkeypatch.setattr(SimulatedDevice, "memory_stats", lambda *_: {})
    _fail()

    (incident,) = witness.incidents
    assert (0, 0) == (incident.allocated_bytes, incident.reserved_bytes)


@pytest.mark.parametrize(("kind", "count"), [("cuda", 1), ("simulated", 0)])
def test_the_drivers_processes_are_listed_for_a_real_card(
    witness: OomWitness, monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    """The driver knows nothing of a simulated card."""
    other = Process(7, "python", 3 * MIB)
    monkeypatch.setattr(
        "pytest_gpumem.instruments.witness.other_processes", lambda _index: (other,)
    )
    monkeypatch.setattr(SimulatedDevice, "kind", kind)
    _fail()

    assert (other,) * count == witness.incidents[0].processes


def test_a_look_that_fails_changes_nothing(
    witness: OomWitness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The OOM is raised as ever, and the figures are there."""
    monkeypatch.setattr(
        "pytest_gpumem.instruments.witness.survey", lambda *_: 1 / 0, raising=True
    )
    _fail()

    assert "could not be looked at: ZeroDivisionError" in witness.incidents[0].note
    assert 100 * MIB == witness.incidents[0].nbytes


INCIDENT = Incident(
    kind="oom",
    device_index=1,
    card="Tesla T4",
    total_bytes=2**34,
    budget_bytes=None,
    room_bytes=100 * MIB,
    allocated_bytes=90 * MIB,
    reserved_bytes=96 * MIB,
    largest_free_bytes=3 * MIB,
    nbytes=20 * MIB,
    site="a.py:1 in f (forward)",
    phase="forward",
    models=(ModelSize("Net", 40 * MIB, 40 * MIB, 32 * MIB, 8 * MIB, "layer.3"),),
    seen_bytes=90 * MIB,
    processes=(Process(7, "python", 3 * MIB), Process(8, "", 0)),
)


def test_arithmetic_is_said_and_honest() -> None:
    """What fits, what does not, and by how much; words for every case."""
    lines = "\n".join(section_lines(INCIDENT, count=3))
    crowded = replace(INCIDENT, room_bytes=45 * MIB)
    trained = replace(INCIDENT, kept_bytes=10 * MIB)
    fragmented = replace(INCIDENT, nbytes=5 * MIB)

    for text in (
        "cuda:1 (Tesla T4, 16 GiB), no budget",
        "the last of 3 OOMs or broken limits",
        "fragmented 6 MiB (largest free block 3 MiB)",
        "another process on the card: 7 (python) holds 3 MiB",
        "another process on the card: 8 holds 0 B",
        "needed at least 110 MiB: live 90 MiB, this request 20 MiB",
        "half precision: would fit (94 MiB of 100 MiB): float32 weights of 32 MiB",
        "offload to the CPU: would fit (78 MiB of 100 MiB)",
        "a batch 2 times smaller: would fit (75 MiB of 100 MiB): 70 MiB of ",
    ):
        assert text in lines
    assert [False, False, True] == [each.fits for each in remedies(crowded)]
    assert "a batch 16 times smaller" == remedies(crowded)[2].name
    assert not remedies(replace(crowded, room_bytes=40 * MIB))[2].fits
    assert "offload to the CPU" not in {each.name for each in remedies(trained)}
    assert "fragments took the rest" in "\n".join(section_lines(fragmented))
    assert [] == remedies(replace(INCIDENT, models=(), allocated_bytes=0, nbytes=0))


def test_memory_viz_opens_a_snapshot(witness: OomWitness, tmp_path: Path) -> None:
    """Protocol 4, plain values, the OOM among the changes, with frames."""
    with history_kept():
        kept = _take(3)
        _fail()
        file = write_snapshot(take_snapshot(), tmp_path / "new", "a.py::test[../x]")

    content = file.read_bytes()
    assert b"\x80\x04" == content[:2]
    assert file.parent == tmp_path / "new"
    snapshot = pickle.loads(content)
    assert "20.0MiB allocated, 17.0MiB" in _memory_viz.segsum(snapshot)
    assert "raise OutOfMemoryError" in _memory_viz.trace(snapshot)
    assert "<html>" in _memory_viz.trace_plot(snapshot).lower()
    assert "<html>" in _memory_viz.segment_plot(snapshot).lower()
    assert kept.is_cuda
    assert witness.incidents


def test_a_users_own_observer_may_ask_the_card(witness: OomWitness) -> None:
    """The documented use: dump a snapshot where memory runs out."""
    seen: list[Any] = []

    def observe(*told: int) -> None:
        seen.append((told, torch.cuda.memory_allocated(), len(take_snapshot())))

    torch._C._cuda_attach_out_of_memory_observer(observe)  # type: ignore[attr-defined]  # stubs lack it
    kept = _take(3)
    _fail()

    (card, segment, limit, free), allocated, _ = seen[0]
    assert (0, 100 * MIB, 24 * MIB) == (card, segment, limit)
    context = CARDS["T4"].context_bytes
    assert CARDS["T4"].total_bytes - context - 20 * MIB == free
    assert kept.numel() == allocated
    assert witness.incidents


@pytest.mark.parametrize("test", ["", "/", "../../etc/passwd", "a" * 999, "ä/ü.py::x"])
def test_a_snapshots_name_is_safe(test: str) -> None:
    """One part of a path, short, ASCII, and each test has its own."""
    name = snapshot_name(test)

    assert Path(name).name == name
    assert name.isascii()
    assert len(name) < 128
    assert not name.startswith((".", "-"))
    assert snapshot_name(test + "x") != name
