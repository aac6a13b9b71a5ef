"""Which device a run uses, decided without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from pytest_gpumem.errors import DeviceUnavailableError
from pytest_gpumem.visibility import VARIABLE, names_of, numbers_of

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
    listed = os.environ.get(VARIABLE)
    hidden = f"{VARIABLE} hides every card"
    if listed is not None and not names_of(listed):
        return hidden
    found = ask_driver()
    if found is None:
        return "this machine has no NVIDIA driver"
    if not found.uuids:
        return "the NVIDIA driver has no card"
    if _major(found.cuda_version) < _major(cuda_version):
        return (
            f"the NVIDIA driver is for CUDA {found.cuda_version}, torch "
            f"{torch_version} for CUDA {cuda_version}"
        )
    # What parts of a card there are, only CUDA can tell.
    is_part = listed is not None and listed.startswith("MIG-")
    return None if is_part or numbers_of(listed, found.uuids) else hidden


def _major(version: str) -> int:
    return int(version.partition(".")[0])


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


class Driver(NamedTuple):
    """What NVIDIA's driver says of the machine.

    Attributes:
        uuids: The cards' UUIDs.
        cuda_version: The newest CUDA version that it serves.
    """

    uuids: tuple[str, ...]
    cuda_version: str


def ask_driver() -> Driver | None:
    """Return what the driver's library says; None without a driver.

    CUDA is not used for it: see Note [When the variable is read].

    Source: NVML API Reference, ``nvmlSystemGetCudaDriverVersion_v2`` (1000 x major +
    10 x minor); CUDA Compatibility, "Minor Version Compatibility" (a driver serves
    every minor version of its major one).
    """
    import ctypes  # noqa: PLC0415  # only where torch could use a card

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return Driver((), "0.0")
    try:
        count, version = ctypes.c_uint(0), ctypes.c_int(0)
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return Driver((), "0.0")
        text = "999.0"  # where it does not tell, torch will
        if nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) == 0:
            text = f"{version.value // 1000}.{version.value % 1000 // 10}"
        uuids = []
        for index in range(count.value):
            handle, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID)
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            nvml.nvmlDeviceGetUUID(handle, uuid, _UUID)
            uuids.append(uuid.value.decode("ascii", "replace"))
        return Driver(tuple(uuids), text)
    finally:
        nvml.nvmlShutdown()


def count_cards() -> int | None:
    """Return how many cards the driver's library counts; None without a driver."""
    found = ask_driver()
    return None if found is None else len(found.uuids)


#: Bytes of a UUID's text. Source: ``NVML_DEVICE_UUID_V2_BUFFER_SIZE`` of ``nvml.h``.
_UUID: Final = 96
