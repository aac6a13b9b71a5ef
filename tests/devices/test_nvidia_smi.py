"""``nvidia-smi`` on simulated cards: what people look at and programs read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from pytest_gpumem.inheritance import CHILDREN_VARIABLE, Inheritance
from pytest_gpumem.nvidia_smi.__main__ import main
from pytest_gpumem.tenancy.entries import Folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Answer = Callable[..., tuple[int, str]]

MIB = 2**20
TOTAL_MIB = 14917  # a T4's total, whole MiB
CONTEXT_MIB = 111


def _say(
    monkeypatch: pytest.MonkeyPatch,
    card: str = f"T4,ctx={CONTEXT_MIB}MiB",
    **given: object,
) -> None:
    settings: dict[str, object] = {
        "backend": "simulated",
        "folder": "",
        "options": {"card": card, "values": "computed"},
        "budgets": {},
    }
    told = Inheritance(**(settings | given))  # type: ignore[arg-type]  # as a run makes it
    monkeypatch.setenv(CHILDREN_VARIABLE, told.text)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Answer:
    """Return exit code and output of the program with such arguments."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(arguments)
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def card_folder(tmp_path: Path) -> Folder:
    """Where the processes of a run note what they hold of its first card."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o700)
    return Folder(shared / "card-0")


QUERY = "--query-gpu=memory.total,memory.used,memory.free"


@pytest.mark.parametrize(
    ("style", "shown"),
    [
        (
            "csv",
            "memory.total [MiB], memory.used [MiB], memory.free [MiB]\n"
            "14917 MiB, 0 MiB, 14917 MiB\n",
        ),
        ("csv,noheader", "14917 MiB, 0 MiB, 14917 MiB\n"),
        ("csv,noheader,nounits", "14917, 0, 14917\n"),
    ],
)
def test_figures_come_in_every_style(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, style: str, shown: str
) -> None:
    """With and without header line and units, as programs parse them."""
    _say(monkeypatch)

    assert (0, shown) == answer(QUERY, f"--format={style}")


def test_what_processes_hold_is_used(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, card_folder: Folder
) -> None:
    """Of every process that has noted bytes, and of pretended ones."""
    entry = card_folder.add({"pid": os.getpid(), "nbytes": 1000 * MIB})
    _say(
        monkeypatch,
        shared=str(card_folder.path.parent),
        tenants={"0": {"900001": 500 * MIB}},
    )

    code, text = answer(QUERY, "--format=csv,noheader,nounits")
    _code, apps = answer(
        "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"
    )
    entry.close()

    assert (0, f"{TOTAL_MIB}, 1500, {TOTAL_MIB - 1500}\n") == (code, text)
    assert f"{os.getpid()}, 1000\n900001, 500\n" == apps


def test_a_budget_bounds_what_is_free(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, card_folder: Folder
) -> None:
    """By what the program that asks has reserved; its context is not of the budget."""
    held = (CONTEXT_MIB + 300) * MIB
    entry = card_folder.add({"pid": os.getppid(), "nbytes": held})
    _say(monkeypatch, shared=str(card_folder.path.parent), budgets={"": "1000MiB"})

    _code, text = answer("--query-gpu=memory.free", "--format=csv,noheader,nounits")
    entry.close()

    assert "700\n" == text


def test_a_budget_of_a_card_that_is_hidden_bounds_nothing(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """The program shows every card; the run numbers those that it sees."""
    _say(monkeypatch, card="T4*2", visible="1", budgets={"0": "1GiB"})

    _code, text = answer(
        "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"
    )

    assert f"0, {TOTAL_MIB}\n1, 1024\n" == text


def test_a_pretended_process_is_on_the_card_that_the_run_means(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """The run's first card is the second of the machine, where it hides the first."""
    _say(
        monkeypatch,
        card="T4*2",
        visible="1",
        tenants={"0": {"900001": 500 * MIB}},
    )

    _code, text = answer(
        "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"
    )

    assert "0, 0\n1, 500\n" == text


def test_cards_are_chosen_by_index_uuid_and_bus(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """Whatever ``CUDA_VISIBLE_DEVICES`` says; one that is not there ends with 6."""
    _say(monkeypatch, card="T4+A100-80GB")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    _code, listed = answer("-L")
    uuids = re.findall(r"UUID: (GPU-[^)]*)", listed)

    assert 2 == len(uuids)
    for wanted in ("1", uuids[1], "00000000:02:00.0"):
        assert answer("-i", wanted, "-L") == (0, listed.splitlines(True)[1])
    assert (0, listed) == answer("-i", "0,1", "-L")
    assert (6, "No devices were found\n") == answer("-i", "2")


def test_the_table_has_cards_and_processes_and_straight_edges(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, card_folder: Folder
) -> None:
    """Each line is as wide as the others, also where names are long."""
    name = "Simulated accelerator with a very long name"
    _say(
        monkeypatch,
        card=f"16GiB,name={name}",
        shared=str(card_folder.path.parent),
        tenants={"0": {"900001": 5 * 2**30}},
    )
    entry = card_folder.add({"pid": os.getpid(), "nbytes": 1000 * MIB})

    code, text = answer()
    entry.close()

    assert 0 == code
    lines = text.splitlines()[1:]
    assert {91} == {len(each) for each in lines if each.strip()}
    assert re.search(r"\|   0  Simulated accelerator wi\.\.\. +Off \|", text)
    assert "|    6120MiB /  16384MiB |" in text
    assert re.search(rf"\|    0   N/A  N/A +{os.getpid()}      C   .* 1000MiB \|", text)
    assert re.search(r" 900001      C   competing_process +5120MiB \|", text)


def test_slices_are_listed_under_their_gpu(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """In the list, in a table of their own, and with the ids of their instances."""
    _say(
        monkeypatch,
        card="A100-80GB:1g.10gb*2+A100-80GB:2g.20gb+T4",
        tenants={"2": {"900001": 500 * MIB}},
    )

    _code, listed = answer("-L")
    _code, text = answer()
    _code, values = answer(
        "--query-gpu=index,memory.used,mig.mode.current,utilization.gpu",
        "--format=csv,noheader",
    )

    assert [
        "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-",
        "  MIG 1g.10gb     Device  0: (UUID: MIG-",
        "  MIG 1g.10gb     Device  1: (UUID: MIG-",
        "  MIG 2g.20gb     Device  2: (UUID: MIG-",
        "GPU 1: Tesla T4 (UUID: GPU-",
    ] == [line.split("0000")[0] for line in listed.splitlines()]
    assert {91} == {len(each) for each in text.splitlines()[1:] if each.strip()}
    assert "|  0    3   0   2  |             500MiB / 19968MiB    | 28 " in text
    assert re.search(r"\|    0     3    0 +900001      C   .* 500MiB \|", text)
    assert "Enabled |" in text
    assert "0, 500 MiB, Enabled, [N/A]\n1, 0 MiB, [N/A], 0 %\n" == values


def test_a_card_without_memory_of_its_own_shows_none(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """But the bytes of its processes, which a Jetson Orin does not list either."""
    _say(
        monkeypatch,
        card="GB10+Jetson-Orin-NX-16GB",
        tenants={"0": {"900001": 500 * MIB}, "1": {"900002": 500 * MIB}},
    )

    _code, text = answer()
    _code, values = answer(QUERY, "--format=csv,noheader")
    _code, log = answer("-q", "-d", "MEMORY")
    _code, apps = answer("--query-compute-apps=pid,used_memory", "--format=csv")

    assert {91} == {len(each) for each in text.splitlines()[1:] if each.strip()}
    assert 2 == text.count("| Not Supported          |")
    assert "[N/A], [N/A], [N/A]\n" * 2 == values
    assert f"        {'Total':<34}: N/A\n" in log
    assert "pid, used_gpu_memory [MiB]\n900001, 500 MiB\n" == apps


def test_an_empty_card_has_no_processes(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """The table says so; torch's report of the environment finds the driver in it."""
    _say(monkeypatch)

    _code, text = answer()

    assert "No running processes found" in text
    # torch/utils/collect_env.py, get_nvidia_driver_version
    assert re.search(r"Driver Version: (.*?) ", text)


def test_the_log_shows_memory(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> None:
    """Of the kinds of log there is that of memory."""
    _say(monkeypatch)

    code, text = answer("-q", "-d", "MEMORY")

    assert 0 == code
    assert f"        Total                             : {TOTAL_MIB} MiB\n" in text
    assert 2 == answer("-q", "-d", "CLOCK")[0]


def test_a_field_that_a_simulated_card_has_not_is_not_available(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """It is neither an error nor a made-up number."""
    _say(monkeypatch)

    fields = "temperature.gpu,power.draw,fan.speed,gpu_serial,clocks.sm"

    assert (0, "[N/A], [N/A], [N/A], [N/A], [N/A]\n") == answer(
        f"--query-gpu={fields}", "--format=csv,noheader"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--query-gpu=cuda_version", "--format=csv"), "is not a valid field"),
        (("--query-gpu=name",), "write csv"),
        (("--query-gpu=name", "--format=xml"), "write csv"),
        (("topo", "-m"), "topo -m"),
        (("--gpu-reset",), "--gpu-reset"),
        (("-l", "0", "-L"), "'0' is not a whole number"),
    ],
)
def test_what_is_wrong_ends_with_2_and_words(
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    """Also what the real program can do and this one cannot."""
    _say(monkeypatch)

    code, text = answer(*arguments)

    assert 2 == code
    assert said in text


def test_outside_a_run_the_machine_has_no_driver(
    monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    """A driver's absence ends with 9, as of the real program."""
    monkeypatch.delenv(CHILDREN_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")

    code, text = answer()

    assert 9 == code
    assert "no run on simulated cards" in text


def test_outside_a_run_the_machine_s_own_program_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It gets the arguments as they are."""
    real = tmp_path / "nvidia-smi"
    real.write_text('#!/bin/sh\necho "real $@"\n')
    real.chmod(0o755)
    monkeypatch.delenv(CHILDREN_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    called: list[object] = []

    def become(*given: object) -> None:
        called.append(given)
        raise SystemExit

    monkeypatch.setattr(os, "execv", become)

    with pytest.raises(SystemExit):
        main(["-L"])

    assert [(str(real), [str(real), "-L"])] == called


def test_a_file_takes_the_answer(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, tmp_path: Path
) -> None:
    """A file that cannot be written is named."""
    _say(monkeypatch)

    assert (0, "") == answer("-L", "-f", str(tmp_path / "cards.txt"))
    assert (tmp_path / "cards.txt").read_text().startswith("GPU 0: Tesla T4")
    code, text = answer("-L", "-f", str(tmp_path / "none" / "cards.txt"))

    assert 2 == code
    assert "none/cards.txt" in text


def test_a_test_and_its_children_find_it(pytester: pytest.Pytester) -> None:
    """First on ``PATH``, with what NVML says, and gone when the run is over."""
    pytester.makepyfile(
        """
        import os, subprocess, sys
        import torch

        ASK = ["nvidia-smi", "--query-gpu=memory.used,memory.free",
               "--format=csv,noheader,nounits"]
        CHILD = "import subprocess, torch; x = torch.ones(2**20, device='cuda');" \
            f"print(subprocess.check_output({ASK}, text=True))"

        def nvml():
            free, total = torch.cuda.mem_get_info()
            return [(total - free) >> 20, free >> 20]

        def ask(text):
            return [int(each) for each in text.split(",")]

        def test_it(competing_process):
            held = torch.ones(2**24, device="cuda")
            told = ask(subprocess.check_output(ASK, text=True))
            assert abs(told[0] - nvml()[0]) <= 1 and abs(told[1] - nvml()[1]) <= 1
            with competing_process("2GiB"):
                more = ask(subprocess.check_output(ASK, text=True))
                child = ask(subprocess.check_output([sys.executable, "-c", CHILD], text=True))
            assert 2048 == more[0] - told[0]
            assert child[0] > more[0]
            assert told == ask(subprocess.check_output(ASK, text=True))
        """
    )
    before = os.environ["PATH"]

    result = pytester.runpytest("--gpu-backend=simulated")

    result.assert_outcomes(passed=1)
    assert before == os.environ["PATH"]


def test_it_goes_on_until_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop shows the cards again and again."""
    _say(monkeypatch)
    script = (
        "from pytest_gpumem.nvidia_smi.__main__ import main; main(['-L', '-lms', '10'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as loop:
        assert loop.stdout is not None
        lines = [loop.stdout.readline() for _time in range(3)]
        loop.kill()

    assert 1 == len(set(lines))
