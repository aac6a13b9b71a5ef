"""What NVML counts, which card it means, and the machines on which it cannot tell."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

pynvml: Any = pytest.importorskip("pynvml")

from fake_nvml import (  # noqa: E402  # after pynvml was found
    PROCESSES,
    TELL_THE_CARD,
    WORDS,
    FakeLibrary,
    Gpu,
    machines,
)

from pytest_gpumem import doctor  # noqa: E402  # after pynvml was found
from pytest_gpumem.devices.nvml import (  # noqa: E402  # after pynvml was found
    CardCount,
    Reading,
    cap_free_memory,
    other_processes,
    why_uncounted,
)
from pytest_gpumem.devices.patches import PatchSet  # noqa: E402  # after pynvml was found
from pytest_gpumem.records.incidents import Process  # noqa: E402  # after pynvml was found

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 2**20
OWN = os.getpid()


class _Properties:
    def __init__(self, uuid: str) -> None:
        self.uuid = uuid


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Cards that CUDA sees, by their UUIDs."""

    def see(*uuids: str) -> None:
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: _Properties(uuids[index])
        )
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))

    return see


def _read(index: int = 0, *, has_context: bool = True) -> Reading:
    return CardCount(index, lambda: has_context).read()


def test_indices_are_never_mixed(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> None:
    """CUDA's second card may be NVML's first: the UUID says which is which."""
    first = Gpu("GPU-aa", 7 * MIB, processes={OWN: 5 * MIB})
    second = Gpu("GPU-bb", 70 * MIB, processes={OWN: 50 * MIB, 1: MIB})
    FakeLibrary(first, second).install(monkeypatch)
    cuda("bb", "aa")

    assert Reading(50 * MIB, 70 * MIB) == _read(0)
    assert Reading(5 * MIB, 7 * MIB) == _read(1)


def test_a_mig_instance_counts_its_own(
    monkeypatch: pytest.MonkeyPatch, cuda: Any
) -> None:
    """By its own UUID, which CUDA tells; the memory is the instance's."""
    mine = Gpu("MIG-mine", 20 * MIB, processes={OWN: 15 * MIB})
    card = Gpu("GPU-card", 900 * MIB, instances=[Gpu("MIG-a"), mine])
    FakeLibrary(card).install(monkeypatch)
    cuda("mine")

    assert Reading(15 * MIB, 20 * MIB) == _read()


def test_the_instance_of_a_card_in_mig_mode_is_found(
    monkeypatch: pytest.MonkeyPatch, cuda: Any
) -> None:
    """Where CUDA tells the card's UUID, it is the instance with this process."""
    mine = Gpu("MIG-mine", 20 * MIB, processes={OWN: 15 * MIB})
    locked = Gpu("MIG-b", errors={PROCESSES: pynvml.NVML_ERROR_NO_PERMISSION})
    card = Gpu("GPU-card", 900 * MIB, instances=[locked, Gpu("MIG-a"), mine])
    FakeLibrary(card).install(monkeypatch)
    cuda("card")

    assert Reading(15 * MIB, 20 * MIB) == _read()


def test_a_card_in_mig_mode_may_not_tell(
    monkeypatch: pytest.MonkeyPatch, cuda: Any
) -> None:
    """Without an instance of this process, and without permission for the card."""
    no = pynvml.NVML_ERROR_NO_PERMISSION
    errors = {PROCESSES: no, "nvmlDeviceGetMemoryInfo": no}
    card = Gpu("GPU-card", instances=[Gpu("MIG-a")], errors=errors)
    FakeLibrary(card).install(monkeypatch)
    cuda("card")

    reading = _read()
    assert (None, None) == reading[:2]
    assert "NVML may not be asked here" in reading.why


@pytest.mark.parametrize("ail", WORDS)
def test_what_cannot_be_told_has_a_word(
    ail: str, monkeypatch: pytest.MonkeyPatch, cuda: Any
) -> None:
    """No error, no number made up; what the card holds is told where it can be."""
    machines("aa")[ail].install(monkeypatch)
    cuda("aa")

    reading = _read()
    assert reading.process_bytes is None
    assert WORDS[ail] in reading.why
    assert (500 * MIB if ail in TELL_THE_CARD else None) == reading.card_bytes


def test_a_process_without_a_context_holds_nothing(
    monkeypatch: pytest.MonkeyPatch, cuda: Any
) -> None:
    """NVML lists no process that has not used the card."""
    FakeLibrary(Gpu("GPU-aa", MIB)).install(monkeypatch)
    cuda("aa")

    assert Reading(0, MIB) == _read(has_context=False)
    assert "does not list this process" in _read(has_context=True).why


def test_without_the_library_there_is_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-ml-py is an extra."""
    monkeypatch.setitem(sys.modules, "pynvml", None)

    assert "nvidia-ml-py is not installed; pip install nvidia-ml-py" == _read().why
    assert _read().why == why_uncounted()
    assert () == other_processes(0)


def test_a_lost_card_may_come_back(monkeypatch: pytest.MonkeyPatch, cuda: Any) -> None:
    """Each reading is told for itself; the card is looked up again after an error."""
    gpu = Gpu("GPU-aa", 9 * MIB, processes={OWN: MIB})
    library = FakeLibrary(gpu)
    library.install(monkeypatch)
    cuda("aa")
    count = CardCount(0, lambda: True)

    before = count.read()
    gpu.errors = {PROCESSES: pynvml.NVML_ERROR_GPU_IS_LOST}
    during = count.read()
    gpu.errors = {}
    after = count.read()

    assert Reading(MIB, 9 * MIB) == before == after
    assert "the card is lost" in during.why
    assert 2 == library.calls.count("nvmlDeviceGetHandleByUUID")


def test_an_unknown_trouble_is_told_too(
    monkeypatch: pytest.MonkeyPatch, cuda: Any
) -> None:
    """Whatever a broken installation raises ends no test."""

    def fail() -> None:
        raise OSError("disk on fire")

    module = FakeLibrary().install(monkeypatch)
    monkeypatch.setattr(module, "nvmlInit", fail)
    cuda("aa")

    assert Reading(None, None, "NVML says 'disk on fire'") == _read()


def test_other_processes_come_from_nvml(
    monkeypatch: pytest.MonkeyPatch, cuda: Any
) -> None:
    """Of CUDA's card, the largest first, this one left out; none where it is unknown."""
    parent = os.getppid()
    processes = {OWN: 1, 2**22 + 1: 5, parent: 9, 2**22 + 2: None}
    FakeLibrary(Gpu("GPU-aa"), Gpu("GPU-bb", processes=processes)).install(monkeypatch)
    cuda("bb")
    found = other_processes(0)
    machines("bb")["no permission"].install(monkeypatch)

    name = Path(f"/proc/{parent}/comm").read_text(encoding="utf-8").strip()
    expected = [(parent, name, 9), (2**22 + 1, "", 5), (2**22 + 2, "", 0)]
    assert tuple(Process(*each) for each in expected) == found
    assert () == other_processes(0)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_budget_caps_the_right_card(
    monkeypatch: pytest.MonkeyPatch, cuda: Any, *, as_bytes: bool
) -> None:
    """NVML's second card is CUDA's first; one that CUDA does not see is left alone."""
    cards = Gpu("GPU-aa", MIB), Gpu("GPU-bb", MIB)
    module = FakeLibrary(*cards).install(monkeypatch)
    cuda("bb")
    patches = PatchSet()
    if as_bytes:  # as older releases of nvidia-ml-py give it
        uuid_of = module.nvmlDeviceGetUUID
        module.nvmlDeviceGetUUID = lambda handle: uuid_of(handle).encode()
    handles = [module.nvmlDeviceGetHandleByIndex(index) for index in (0, 1)]

    cap_free_memory(module, patches, lambda index, _free, total: (index + 7, total))
    told = [module.nvmlDeviceGetMemoryInfo(each).free for each in handles]
    counted = _read().card_bytes
    patches.restore()

    assert [2**34 - MIB, 7] == told
    assert MIB == counted, "what is used is no budget's matter"


def _facts(lines: Sequence[str]) -> str:
    return next(line for line in lines if line.startswith("process bytes"))


@pytest.mark.parametrize("ail", sorted({*WORDS} - {"container", "another card"}))
def test_the_doctor_tells_it(ail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a card in use, what a container hides cannot be seen."""
    machines("aa")[ail].install(monkeypatch)

    line = _facts(doctor.examine().lines())
    assert "unknown: " in line
    assert WORDS[ail] in line


def test_the_doctor_tells_that_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card whose instances count for themselves is well, too."""
    locked = Gpu(
        "GPU-bb",
        instances=[Gpu("MIG-a")],
        errors={PROCESSES: pynvml.NVML_ERROR_NO_PERMISSION},
    )
    FakeLibrary(Gpu("GPU-aa", processes={1: 5}), locked).install(monkeypatch)
    found = doctor.examine()

    assert _facts(found.lines()).endswith("NVML counts them")
    assert "999.1" == found.facts["driver"]
