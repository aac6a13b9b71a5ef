"""The text of an out-of-memory error is the caching allocator's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpumem.allocator.oom_text import ProcessMemory, format_bytes, oom_text

MIB = 2**20
GIB = 2**30


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1024 bytes"),
        (1025, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (MIB - 1, "1024.00 KiB"),
        (MIB, "1024.00 KiB"),
        (MIB + 1, "1.00 MiB"),
        (2**30, "1024.00 MiB"),
        (2**30 + 1, "1.00 GiB"),
        (2**40, "1024.00 GiB"),
    ],
)
def test_bytes_are_written_as_the_allocator_writes_them(nbytes: int, text: str) -> None:
    """Bounds between units are inclusive, and GiB is the largest unit."""
    assert text == format_bytes(nbytes)


@given(st.integers(0, 2**60))
def test_written_bytes_are_near_the_bytes(nbytes: int) -> None:
    """What is written is within half a hundredth of its unit."""
    number, unit = format_bytes(nbytes).split()
    size = {"bytes": 1, "KiB": 2**10, "MiB": MIB, "GiB": GIB}[unit]

    assert abs(float(number) * size - nbytes) <= 0.0051 * size


def test_a_plain_text_is_torchs() -> None:
    """Without limit and processes, the text has four sentences; two spaces are real."""
    text = oom_text(
        device_index=1,
        segment_bytes=20 * MIB,
        total_bytes=4 * GIB,
        free_bytes=3 * MIB,
        allowed_bytes=None,
        allocated_bytes=GIB + 1,
        reserved_bytes=GIB + 1025,
        processes=[],
    )

    assert (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 1 has a total capacity of "
        "4.00 GiB of which 3.00 MiB is free. Of the allocated memory 1.00 GiB is "
        "allocated by PyTorch, and 1024 bytes is reserved by PyTorch but unallocated. "
        "If reserved but unallocated memory is large try setting "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
        "documentation for Memory Management  (https://docs.pytorch.org/docs/stable/"
        "notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
    ) == text


def test_processes_and_limit_stand_before_the_allocated_memory() -> None:
    """Every process has a sentence; the limit has half of one."""
    text = oom_text(
        device_index=0,
        segment_bytes=2 * MIB,
        total_bytes=GIB,
        free_bytes=0,
        allowed_bytes=512 * MIB,
        allocated_bytes=0,
        reserved_bytes=0,
        processes=[ProcessMemory(4711, GIB), ProcessMemory(None, 100)],
    )

    assert (
        "0 bytes is free. Process 4711 has 1024.00 MiB memory in use. Including "
        "non-PyTorch memory, this process has 100 bytes memory in use. 512.00 MiB "
        "allowed; Of the allocated memory 0 bytes"
    ) in text


def test_libraries_recognise_the_text() -> None:
    """It has the phrases that accelerate, Lightning and others look for."""
    text = oom_text(
        device_index=0,
        segment_bytes=2 * MIB,
        total_bytes=GIB,
        free_bytes=0,
        allowed_bytes=None,
        allocated_bytes=0,
        reserved_bytes=0,
        processes=[],
    )

    assert " out of memory." in text
    assert re.match(
        r"^(CUDA|HIP|XPU) out of memory\. Tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)",
        text,
    )
