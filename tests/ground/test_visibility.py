"""Hiding and choosing cards: ``CUDA_VISIBLE_DEVICES``, as CUDA and torch read it."""

from __future__ import annotations

import os
from typing import Any, Final

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from versions import COUNTS_BY_CUDA

from pytest_gpumem.cards import find_card, uuids_of
from pytest_gpumem.devices.active import active_device
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import DeviceUnavailableError
from pytest_gpumem.instruments.recorder import PeakRecorder
from pytest_gpumem.visibility import (
    VISIBLE_VARIABLE,
    numbers_of,
    uuid_of,
    visible_names,
)

pytest_plugins = ["pytester"]

NO_CARDS = "No CUDA GPUs are available"
LIGHT = ("-p", "no:cacheprovider")

#: What the variable says, and which of a machine's three cards are seen.
SHOWN = {
    "": (),
    " ": (),
    "-1": (),
    "none": (),
    "NoDevFiles": (),
    "0": (0,),
    "2": (2,),
    "3": (),
    "5,0": (),
    "0,3,1": (0,),
    "2,1": (2, 1),
    "1, 0": (1, 0),
    "0,2,-1,1": (0, 2),
    "0,1,0": (),
    "1gpu,2ampere": (1, 2),
    "+1,-0": (1, 0),
    "1,,2": (1,),
    uuid_of(1): (1,),
    f"{uuid_of(2)},{uuid_of(0)}": (2, 0),
    f"{uuid_of(1)},{uuid_of(1)}": (),
    f"{uuid_of(1)},0": (1,),
    f"0,{uuid_of(1)}": (0,),
    "GPU-": (),  # not the beginning of one UUID alone
    "GPU-f": (),
    "MIG-GPU-00000000-0000-0000-0000-000000000000/1/0": (),
    "9" * 30: (),
}


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE_VARIABLE, raising=False)


@pytest.mark.parametrize("listed", SHOWN)
def test_the_variable_shows_what_cuda_shows(
    listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its order, up to the first entry that names none; torch agrees everywhere."""
    kinds = ("T4", "A100-80GB", "V100-16GB")
    with simulated_device("+".join(kinds)) as machine:
        monkeypatch.setenv(VISIBLE_VARIABLE, listed)
        before = torch.cuda.device_count()  # through NVML
        is_available = torch.cuda.is_available()
        numbers = tuple(card.number for card in machine.cards)
        names = [
            torch.cuda.get_device_name(index)
            for index in range(torch.cuda.device_count())
        ]
        every = [card.card.name for card in machine.all_cards]

        assert SHOWN[listed] == numbers
        assert len(numbers) == before == torch.cuda.device_count()
        assert len(numbers) == torch.accelerator.device_count()
        assert is_available == bool(numbers) == torch.accelerator.is_available()
        assert [every[number] for number in numbers] == names
        for index, number in enumerate(numbers):
            held = torch.empty(2**21, dtype=torch.uint8, device=index)
            assert [held.nbytes if each is machine.all_cards[number] else 0
                    for each in machine.all_cards] == [
                each.allocator.allocated_bytes for each in machine.all_cards
            ]  # fmt: skip
            uuid = torch.cuda.get_device_properties(index).uuid
            assert uuid_of(number) == f"GPU-{uuid}"
            del held


_ENTRIES = st.sampled_from(
    ["0", "1", "2", "3", "-1", "+1", " 2", "", "x", "1x", "GPU-", "MIG-1/0/0"]
) | st.integers(0, 2).map(uuid_of)
_UUIDS = [uuid_of(number) for number in range(3)]


@given(st.lists(_ENTRIES, max_size=4).map(",".join))
@example("GPU-0")
def test_the_variable_is_read_as_torch_reads_it(listed: str) -> None:
    """Torch's own parser, which stands in for CUDA's, says the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VISIBLE_VARIABLE, listed)
        parsed: Any = torch.cuda._parse_visible_devices()
    assert parsed == visible_names(listed)

    if parsed and isinstance(parsed[0], str):
        expected = torch.cuda._transform_uuid_to_ordinals(parsed, _UUIDS)
    else:
        beyond = (place for place, each in enumerate(parsed) if each >= 3)
        expected = parsed[: next(beyond, None)]
    assert tuple(expected) == numbers_of(listed, _UUIDS)


USES: dict[str, Any] = {
    "zeros": lambda: torch.zeros(1, device="cuda"),
    "index": lambda: torch.zeros(1, device=0),
    "tensor": lambda: torch.tensor([1.0], device="cuda"),
    "cuda": lambda: torch.zeros(1).cuda(),
    "to": lambda: torch.zeros(1).to("cuda:0"),
    "module": lambda: torch.nn.Linear(1, 1).cuda(),
    "set_device": lambda: torch.cuda.set_device(0),
    "current_device": torch.cuda.current_device,
    "device": lambda: torch.cuda.device(0).__enter__(),
    "name": torch.cuda.get_device_name,
    "mem_get_info": torch.cuda.mem_get_info,
    "synchronize": torch.cuda.synchronize,
    "stream": torch.cuda.Stream,
    "init": torch.cuda.init,
}


_SLICED: Final = uuids_of(find_card("A100-80GB:1g.10gb*3+T4"))


@pytest.mark.parametrize(
    ("listed", "shown"),
    [
        (None, (0, 1, 2, 3)),
        ("1,3", (1, 3)),
        (_SLICED[2], (2,)),
        (f"{_SLICED[2]},{_SLICED[0]}", (2, 0)),
        (f"{_SLICED[1]},GPU-0", (1,)),
        (_SLICED[3], (3,)),
        ("MIG-ffffffff", ()),
        # The form of drivers before R470: none of these runs here.
        ("MIG-GPU-00000000-0000-0000-0000-000000000000/7/0", ()),
    ],
)
def test_slices_are_shown_by_their_names(
    listed: str | None, shown: tuple[int, ...]
) -> None:
    """Since driver R570 one process can have several slices (MIG), as other cards."""
    assert shown == numbers_of(listed, _SLICED)


@pytest.mark.parametrize("use", USES)
def test_a_hidden_card_cannot_be_used(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends in torch's own error."""
    monkeypatch.setenv(VISIBLE_VARIABLE, "")
    with simulated_device("T4"), pytest.raises(RuntimeError, match=f"^{NO_CARDS}$"):
        USES[use]()


def test_code_for_the_cpu_runs_where_the_card_is_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Seeds, training, autocast, saved tensors and queries that need no card."""
    monkeypatch.setenv(VISIBLE_VARIABLE, "-1")
    with simulated_device("T4"):
        torch.manual_seed(0)
        torch.cuda.manual_seed_all(0)
        torch.cuda.empty_cache()
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
        optimizer = torch.optim.AdamW(model.parameters())
        with torch.autocast("cpu"):
            model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        torch.save(model.state_dict(), tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", map_location="cpu")

        assert loaded.keys() == model.state_dict().keys()
        assert (0, 0) == (torch.cuda.device_count(), torch.cuda.memory_allocated())
        assert not torch.cuda.is_initialized()
        assert torch.device("cuda", 2) == torch.device(2)
        with pytest.raises(RuntimeError, match=NO_CARDS):
            torch.empty(1, pin_memory=True)


def test_a_device_is_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming a card that is not there is no error, and no use of CUDA."""
    with simulated_device("T4"):
        for index in (0, 2, 63):
            assert torch.device(f"cuda:{index}") == torch.device(index)
        monkeypatch.setenv(VISIBLE_VARIABLE, "")

        assert not torch.cuda.is_available()
        with pytest.raises(RuntimeError, match=NO_CARDS):
            torch.zeros(1, device=torch.device(2))


@pytest.mark.parametrize("use", [torch.cuda.is_available, torch.cuda.init])
def test_cuda_reads_the_variable_once(
    use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is first used; what is set afterwards comes too late."""
    with simulated_device("T4*2"):
        use()
        monkeypatch.setenv(VISIBLE_VARIABLE, "")
        assert torch.cuda.is_available()
        assert torch.zeros(1, device="cuda:1").is_cuda
        assert (2 if COUNTS_BY_CUDA else 0) == torch.cuda.device_count()
    with simulated_device("T4"):
        assert not torch.cuda.is_available()
        monkeypatch.delenv(VISIBLE_VARIABLE)
        assert not torch.cuda.is_available()
        with pytest.raises(RuntimeError, match=NO_CARDS):
            torch.zeros(1, device="cuda")


def test_what_is_counted_through_nvml_is_no_use_of_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch counts anew until CUDA is initialised, and keeps the count from then on."""
    with simulated_device("T4*2"):
        counts = []
        for listed in ("", "1", "0,1"):
            monkeypatch.setenv(VISIBLE_VARIABLE, listed)
            counts.append(torch.cuda.device_count())
        monkeypatch.setenv(VISIBLE_VARIABLE, "1")
        torch.zeros(1, device="cuda")
        monkeypatch.setenv(VISIBLE_VARIABLE, "0,1")

        assert [0, 1, 2] == counts
        assert (1 if COUNTS_BY_CUDA else 2) == torch.cuda.device_count()


def test_figures_are_of_the_cards_that_are_shown_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was opened before CUDA was used follows the card of that index."""
    with simulated_device("T4+A100-80GB") as machine:
        device = active_device()
        trackers = [device.open_tracker(index) for index in range(2)]
        monkeypatch.setenv(VISIBLE_VARIABLE, "1,0")
        with PeakRecorder() as recorder:
            held = torch.zeros(2**20, device="cuda")
        figures = [each.close() for each in trackers]

        assert held.nbytes == machine.all_cards[1].allocator.allocated_bytes
        assert [held.nbytes, 0] == [each.peak_allocated_bytes for each in figures]
        assert held.nbytes == recorder.figures.peak_allocated_bytes
        with pytest.raises(torch.OutOfMemoryError, match="GPU 1 has a total capacity"):
            torch.empty(10**11, dtype=torch.uint8, device="cuda:1")
        assert not machine.on_change


def test_instruments_say_that_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where none is installed."""
    monkeypatch.setenv(VISIBLE_VARIABLE, "")
    with (
        simulated_device("T4"),
        pytest.raises(DeviceUnavailableError, match="CUDA_VIS"),
    ):
        active_device()


SUITE = """
import os
import subprocess
import sys
import pytest
import torch

CODE = (
    "import torch; print(torch.cuda.is_available(), torch.cuda.device_count());"
    "torch.zeros(1).cuda()"
)

def child(environment):
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True
    )
    return run.stdout.strip(), run.stderr.strip().splitlines()[-1:]

def test_the_cpu_path(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not torch.cuda.is_available()
    assert 0 == torch.cuda.device_count()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert "cpu" == torch.zeros(1, device=device).device.type
    with pytest.raises(RuntimeError, match="^No CUDA GPUs are available$"):
        torch.zeros(1).cuda()

def test_children(monkeypatch):
    out, error = child({**os.environ, "CUDA_VISIBLE_DEVICES": "-1"})
    assert "False 0" == out
    assert ["RuntimeError: No CUDA GPUs are available"] == error
    assert ("True 1", []) == child(os.environ)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="plain"),
        pytest.param(
            ["--gpu-budget=1GiB", "--gpu-max-vram=1GiB", "--gpu-leak-check"],
            id="limits",
        ),
    ],
)
def test_a_test_of_the_cpu_path_works_unmodified(
    pytester: pytest.Pytester, arguments: list[str]
) -> None:
    """It hides the card before CUDA is first used, from itself or from a child."""
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_subprocess(
        *LIGHT, "--gpu-backend=simulated", *arguments
    )

    result.assert_outcomes(passed=2)


@pytest.mark.parametrize("listed", ["", "-1", "1"])
def test_a_run_whose_cards_are_hidden_says_so(
    pytester: pytest.Pytester, listed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tests see no card; those that need one are skipped with the reason."""
    monkeypatch.setenv(VISIBLE_VARIABLE, listed)
    pytester.makepyfile(
        """
        import pytest
        import torch

        def test_cpu():
            assert not torch.cuda.is_available()
            assert torch.zeros(3).sum() == 0

        @pytest.mark.max_vram("1GiB")
        def test_card():
            raise SystemError

        def test_fixture(vram_recorder):
            raise SystemError
        """
    )
    result = pytester.runpytest(
        *LIGHT, "-rs", "--gpu-backend=simulated", "--gpu-budget=0=1GiB"
    )

    result.assert_outcomes(passed=1, skipped=1, errors=1)
    why = f"CUDA_VISIBLE_DEVICES={listed!r} hides every card"
    result.stdout.fnmatch_lines([
        f"gpumem: backend simulated (as requested), no card is seen, as {why}*",
        f"*this test needs a GPU, but {why}; unset it",
        f"SKIPPED * needs a GPU, but {why}",
    ])  # fmt: skip


def test_a_test_that_needs_the_card_after_it_was_hidden_is_an_error(
    pytester: pytest.Pytester,
) -> None:
    """The process has lost it, as with a real one; the error says since when."""
    pytester.makepyfile(
        """
        import pytest
        import torch

        def test_cpu(monkeypatch):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
            assert not torch.cuda.is_available()

        @pytest.mark.max_vram("1GiB")
        def test_card():
            raise SystemError
        """
    )
    result = pytester.runpytest(*LIGHT, "--gpu-backend=simulated")

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["*GPU, but CUDA_VISIBLE_DEVICES='' hid every card when this process first *"]
    )


def test_budgets_and_figures_follow_a_childs_choice(
    pytester: pytest.Pytester,
) -> None:
    """Also one that it makes after it has imported torch."""
    pytester.makepyfile(
        """
        import os
        import subprocess
        import sys
        import pytest

        CODE = (
            "import os, torch; os.environ['CUDA_VISIBLE_DEVICES'] = '1';"
            "assert torch.cuda.mem_get_info()[0] == 2**30;"
            "torch.empty(2**25, dtype=torch.uint8, device='cuda')"
        )

        @pytest.mark.max_vram("16MiB", device=1, phase="children")
        def test_child():
            subprocess.run([sys.executable, "-c", CODE], check=True)
        """
    )
    result = pytester.runpytest(
        *LIGHT,
        "--gpu-backend=simulated",
        "--gpu-card=T4*2",
        "--gpu-budget=0=2GiB,1=1GiB",
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*32 MiB * on cuda:1, limit 16 MiB*"])


def test_nvml_counts_the_machines_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever this process sees; a card is found by its UUID."""
    pynvml = pytest.importorskip("pynvml")
    monkeypatch.setenv(VISIBLE_VARIABLE, "1")
    with simulated_device("T4+A100-80GB"):
        pynvml.nvmlInit()
        seen = torch.cuda.get_device_properties(0).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{seen}")

        assert 2 == pynvml.nvmlDeviceGetCount()
        assert 1 == pynvml.nvmlDeviceGetIndex(handle)
        assert torch.cuda.get_device_name(0) == pynvml.nvmlDeviceGetName(handle)
    assert os.environ[VISIBLE_VARIABLE] == "1"
