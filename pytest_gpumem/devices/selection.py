"""Which device a run uses, decided without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from pytest_gpumem.errors import DeviceUnavailableError

BACKENDS: Final = ("auto", "cuda", "simulated", "off")


class Choice(NamedTuple):
    """The device of a run and why.

    Attributes:
        kind: ``"cuda"``, ``"simulated"`` or ``"off"``.
        reason: Half a sentence for the report's header.
    """

    kind: str
    reason: str


def choose(backend: str) -> Choice:
    """Return the device that a backend option means on this machine.

    ``auto`` takes a usable CUDA card where there is one, else the simulated device.
    A card is usable if torch was built with CUDA and NVIDIA's driver counts one.

    Args:
        backend: One of ``BACKENDS``.

    Raises:
        DeviceUnavailableError: ``cuda`` was asked for and cannot be had.
    """
    if backend == "off":
        return Choice("off", "switched off")
    version = torch_versions()
    if version is None:
        return Choice("off", "torch is not installed")
    if backend == "simulated":
        return Choice("simulated", "as asked for")
    missing = why_no_card(*version)
    if missing is None:
        return Choice("cuda", "as asked for" if backend == "cuda" else "a usable card")
    if backend == "cuda":
        raise DeviceUnavailableError(
            f"backend 'cuda' was asked for, but {missing}; use auto or simulated"
        )
    return Choice("simulated", missing)


def why_no_card(torch_version: str, cuda_version: str | None) -> str | None:
    """Return why torch cannot use a real card here; None if it seems it can."""
    if cuda_version is None:
        return f"torch {torch_version} is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every card"
    count = count_cards()
    if count is None:
        return "this machine has no NVIDIA driver"
    return None if count else "the NVIDIA driver has no card"


def torch_versions() -> tuple[str, str | None] | None:
    """Return torch's version and the CUDA version it was built with.

    Read from the file that torch's build writes, since importing torch takes seconds.

    Source: ``torch/version.py``, written by ``tools/generate_torch_version.py``.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return (version[1] if version else "unknown", cuda[1] if cuda else None)


def count_cards() -> int | None:
    """Return how many cards the driver's library counts; None without a driver."""
    import ctypes  # noqa: PLC0415  # only where torch could use a card

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return 0
    try:
        count = ctypes.c_uint(0)
        failed = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0
        return 0 if failed else count.value
    finally:
        nvml.nvmlShutdown()
