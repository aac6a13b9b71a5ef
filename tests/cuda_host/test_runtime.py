"""The substitute itself: what it says of its cards, and who holds what of them."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Start = Callable[..., subprocess.Popen[str]]
    Output = Callable[..., list[str]]

MIB = 2**20


def test_torch_sees_the_cards_that_were_asked_for(output: Output) -> None:
    """Count, name, size, capability and multiprocessors; looking makes no context."""
    lines = output(
        """
import torch
properties = torch.cuda.get_device_properties(2)
print(torch.cuda.device_count(), properties.name, properties.total_memory)
print(properties.major, properties.minor, properties.multi_processor_count)
print([torch._C._cuda_hasPrimaryContext(i) for i in range(3)])
torch.empty(1, device="cuda:1")
print([torch._C._cuda_hasPrimaryContext(i) for i in range(3)])
""",
        CUDA_HOST_DEVICES="3",
        CUDA_HOST_TOTAL="1.5G",
        CUDA_HOST_CC="7.5",
        CUDA_HOST_NAME="A card",
    )

    assert f"3 A card {3 * 2**29}" == lines[0]
    assert "7 5 40" == lines[1]
    assert "[False, False, False]" == lines[2]
    assert "[False, True, False]" == lines[3]


def test_memory_is_charged_in_pages_and_runs_out(output: Output) -> None:
    """Of the card that was asked, to the last page; what is freed can be had again."""
    lines = output(
        """
import torch
card = torch.device("cuda:1")
kept = torch.empty(3 * 2**20, dtype=torch.uint8, device=card)
print(*torch.cuda.mem_get_info(1), *torch.cuda.mem_get_info(0))
kept = None
torch.cuda.empty_cache()
rest = torch.empty(torch.cuda.mem_get_info(1)[0], dtype=torch.uint8, device=card)
print(torch.cuda.mem_get_info(1)[0])
try:
    torch.empty(1, device=card)
except torch.OutOfMemoryError as error:
    print(error)
""",
        CUDA_HOST_TOTAL="1G",
        CUDA_HOST_CONTEXT="100M",
        CUDA_HOST_OTHERS="24M",
    )

    total = 2**30
    left = total - 124 * MIB
    assert [left - 20 * MIB, total, left, total] == [int(n) for n in lines[0].split()]
    assert "0" == lines[1]
    assert (
        "GPU 1 has a total capacity of 1024.00 MiB of which 0 bytes is free" in lines[2]
    )
    assert "this process has 1000.00 MiB memory in use" in lines[2]


HOLDER = """
import sys
import torch
kept = torch.empty(200 * 2**20, dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.readline()
"""
NVML = """
import os
import pynvml
pynvml.nvmlInit()
card = pynvml.nvmlDeviceGetHandleByIndex(0)
print(pynvml.nvmlDeviceGetMemoryInfo(card).used)
info = pynvml.nvmlDeviceGetMemoryInfo(card, version=pynvml.nvmlMemory_v2)
print(info.used, info.free + info.used == info.total)
for each in pynvml.nvmlDeviceGetComputeRunningProcesses(card):
    print(each.pid, each.usedGpuMemory)
"""


def test_processes_share_the_cards(start: Start, output: Output) -> None:
    """NVML lists who holds what; what a killed process held is free at once."""
    first, second = (start(HOLDER, CUDA_HOST_CONTEXT="50M") for _ in range(2))
    for each in (first, second):
        assert each.stdout is not None
        assert "held\n" == each.stdout.readline()

    both = output(NVML, CUDA_HOST_CONTEXT="50M")
    os.kill(first.pid, signal.SIGKILL)
    # It is not waited for yet: the driver takes memory back before.
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
    one = output(NVML, CUDA_HOST_CONTEXT="50M")
    free = output(
        "import torch; print(*torch.cuda.mem_get_info())", CUDA_HOST_CONTEXT="50M"
    )
    first.communicate()
    second.communicate("end\n")
    none = output(NVML, CUDA_HOST_CONTEXT="50M")

    held = 250 * MIB
    assert {f"{each.pid} {held}" for each in (first, second)} == set(both[2:])
    assert [str(2 * held), f"{2 * held} True"] == both[:2]
    assert [str(held), f"{held} True", f"{second.pid} {held}"] == one
    assert f"{2**34 - held - 50 * MIB} {2**34}" == free[0]
    assert ["0", "0 True"] == none


def test_hidden_cards(output: Output) -> None:
    """``CUDA_VISIBLE_DEVICES`` renumbers CUDA's cards and none of NVML's."""
    count = """
import ctypes
number = ctypes.c_int()
ctypes.CDLL(None).cudaGetDeviceCount(ctypes.byref(number))
print(number.value)
"""
    which = """
import pynvml, torch
from pytest_gpumem.devices.nvml import find_handle
torch.empty(1, device="cuda")
print(pynvml.nvmlDeviceGetIndex(find_handle(pynvml, 0)), torch.cuda.device_count())
"""
    uuid = "GPU-63756461-2d68-6f73-7400-000000000002"
    asked = {"2,0": 2, "1,7,0": 1, "1, 2": 2, uuid: 1, uuid[:-1]: 0}
    asked |= {"": 0, "-1": 0, "0,0": 0, "NoDevFiles": 0}

    for text, expected in asked.items():
        got = output(count, CUDA_VISIBLE_DEVICES=text, CUDA_HOST_DEVICES="3")
        assert [str(expected)] == got, text
    for text in ("2,0", f"{uuid},1"):
        got = output(which, CUDA_VISIBLE_DEVICES=text, CUDA_HOST_DEVICES="3")
        assert ["2 2"] == got


def test_a_forked_child_cannot_use_cuda(output: Output) -> None:
    """As its parent used it; and the parent's memory stays the parent's."""
    lines = output(
        """
import os
import torch
kept = torch.empty(2**20, device="cuda")
before = torch.cuda.mem_get_info()
child = os.fork()
if not child:
    try:
        torch.empty(1, device="cuda")
    except RuntimeError as error:
        print(str(error).partition(".")[0], flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(before == torch.cuda.mem_get_info())
"""
    )

    assert ["Cannot re-initialize CUDA in forked subprocess", "True"] == lines


def test_held_events_are_pending_until_somebody_waits(output: Output) -> None:
    """A block that another stream used is not reused before that; nor after a wait."""
    lines = output(
        """
import ctypes
import torch
hold = ctypes.CDLL(None).cuda_host_hold_events
stream = torch.cuda.Stream()
event = torch.cuda.Event()
print(event.query())
def active():
    return torch.cuda.memory_stats()["active_bytes.all.current"]
def use_on_another_stream():
    block = torch.empty(30 * 2**20, dtype=torch.uint8, device="cuda")
    block.record_stream(stream)
use_on_another_stream()
torch.empty(1, device="cuda")
print(active())
hold(1)
use_on_another_stream()
torch.empty(1, device="cuda")
print(active())
event.record(stream)
print(event.query(), stream.query())
event.synchronize()
print(event.query(), stream.query())
torch.empty(1, device="cuda")
print(active())
other = torch.cuda.Stream()
event.record(stream)
other.wait_event(event)
print(event.query(), other.query())
other.synchronize()
print(event.query(), other.query())
use_on_another_stream()
hold(0)
torch.empty(1, device="cuda")
print(active())
"""
    )

    assert "True" == lines[0]
    assert [0, 30 * MIB] == [int(each) for each in lines[1:3]]
    assert ["False False", "True True", "0"] == lines[3:6]
    assert ["False False", "True True", "0"] == lines[6:]


def test_an_expandable_segment_is_mapped_in_pages(output: Output) -> None:
    """Growing by what lacks, and giving back what is unmapped."""
    lines = output(
        """
import torch
before = torch.cuda.mem_get_info()[0]
kept = [torch.empty(30 * 2**20, dtype=torch.uint8, device="cuda") for _ in range(3)]
print(before - torch.cuda.mem_get_info()[0], len(torch.cuda.memory_snapshot()))
del kept
torch.cuda.empty_cache()
print(before - torch.cuda.mem_get_info()[0])
""",
        PYTORCH_ALLOC_CONF="expandable_segments:True",
    )

    assert [f"{100 * MIB} 1", "0"] == lines
