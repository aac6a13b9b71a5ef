"""Chooses the device of a run, without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Final, NamedTuple

from pytest_gpumem.devices.accelerators import other_accelerator, why_no_amd_card
from pytest_gpumem.errors import DeviceUnavailableError
from pytest_gpumem.visibility import VISIBLE_VARIABLE, numbers_of, visible_names

BACKENDS: Final = ("auto", "cuda", "simulated", "off")


#: The oldest torch version that is supported and tested.
OLDEST_TORCH: Final = (2, 8)


#: Matches an assignment of a text in ``torch/version.py``; a value of None does not match.
_SAID: Final = re.compile(
    r"^(__version__|cuda|hip|xpu)\b[^=\n]*=\s*['\"]([^'\"]+)", re.MULTILINE
)


class TorchBuild(NamedTuple):
    """The build of the installed torch, from its files.

    Attributes:
        version: Torch's version; ``"unknown"`` if the files do not contain it.
        cuda: The CUDA version, or None.
        hip: The version of AMD's HIP, or None.
        xpu: The version of Intel's compiler, or None.
    """

    version: str
    cuda: str | None = None
    hip: str | None = None
    xpu: str | None = None


class Choice(NamedTuple):
    """The device of a run and the reason for the choice.

    Attributes:
        kind: ``"cuda"``, ``"simulated"`` or ``"off"``.
        reason: Part of a sentence, for the report's header.
    """

    kind: str
    reason: str


def choose(backend: str) -> Choice:
    """Return the device that a backend option means on this machine.

    ``auto`` means a usable card if there is one, or else the simulated device. A card is
    usable if torch was built with CUDA and NVIDIA's driver finds a card, or with ROCm and
    the kernel lists one. If torch computes on another accelerator (Apple's or Intel's),
    ``auto`` changes nothing.

    Args:
        backend: One of ``BACKENDS``.

    Raises:
        DeviceUnavailableError: ``cuda`` was requested but is not available, or torch is
            too old.
    """
    if backend == "off":
        return Choice("off", "switched off")
    build = torch_build()
    if build is None:
        return Choice("off", "torch is not installed")
    _check_age(build)
    if backend == "simulated":
        return Choice("simulated", "as requested")
    missing = why_no_card(build)
    if missing is None:
        return Choice("cuda", "as requested" if backend == "cuda" else "a usable card")
    return _without_a_card(backend, build, missing)


def _without_a_card(backend: str, build: TorchBuild, missing: str) -> Choice:
    """Return the device that a backend option means if torch cannot use a card."""
    if backend == "cuda":
        raise DeviceUnavailableError(
            f"backend 'cuda' was requested, but {missing}; use auto or simulated"
        )
    other = other_accelerator(build)
    if other is None:
        return Choice("simulated", missing)
    return Choice(
        "off",
        f"this machine has {other}, which is left alone; "
        "--gpu-backend=simulated simulates a CUDA card",
    )


def _check_age(build: TorchBuild) -> None:
    numbers = re.match(r"([0-9]+)\.([0-9]+)", build.version)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = "{}.{}".format(*OLDEST_TORCH)
        raise DeviceUnavailableError(
            f"torch {build.version} is installed, the oldest that is supported is "
            f"{oldest}; install a newer torch, or use --gpu-backend=off"
        )


def why_no_card(build: TorchBuild) -> str | None:
    """Return why torch cannot use a real card on this machine; None if it probably can."""
    if build.hip:
        missing = why_no_amd_card()
        return missing and f"torch {build.version} is built for ROCm, but {missing}"
    if build.cuda is None:
        return f"torch {build.version} is built without CUDA"
    return _why_no_nvidia_card(build.version, build.cuda)


def _why_no_nvidia_card(torch_version: str, cuda_version: str) -> str | None:
    listed = os.environ.get(VISIBLE_VARIABLE)
    hidden = f"{VISIBLE_VARIABLE} hides every card"
    if listed is not None and not visible_names(listed):
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
    # Only CUDA knows the MIG instances of a card.
    is_part = listed is not None and listed.startswith("MIG-")
    return None if is_part or numbers_of(listed, found.uuids) else hidden


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def torch_build() -> TorchBuild | None:
    """Return the build of the installed torch; None if torch is not installed.

    It is read from a file that torch's build writes, because importing torch takes seconds.

    Source: ``torch/version.py``, written by ``tools/generate_torch_version.py``.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name("version.py")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    said = dict(_SAID.findall(text))
    version = said.pop("__version__", "unknown")
    return TorchBuild(version, **said)


class NvidiaDriver(NamedTuple):
    """The machine's cards and CUDA version, from NVIDIA's driver.

    Attributes:
        uuids: The cards' UUIDs.
        cuda_version: The newest CUDA version that the driver supports.
    """

    uuids: tuple[str, ...]
    cuda_version: str


def ask_driver() -> NvidiaDriver | None:
    """Return the data of the driver's library; None without a driver.

    CUDA is not used: see Note [When the variable is read].

    Source: NVML API Reference, ``nvmlSystemGetCudaDriverVersion_v2`` (1000 x major +
    10 x minor); CUDA Compatibility, "Minor Version Compatibility" (a driver supports
    every minor version of its major version).
    """
    import ctypes

    try:
        nvml = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return NvidiaDriver((), "0.0")
    try:
        count, version = ctypes.c_uint(0), ctypes.c_int(0)
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return NvidiaDriver((), "0.0")
        text = "999.0"  # if the driver does not report it, torch raises its own error
        if nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) == 0:
            text = f"{version.value // 1000}.{version.value % 1000 // 10}"
        uuids = []
        for index in range(count.value):
            handle, uuid = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID)
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            nvml.nvmlDeviceGetUUID(handle, uuid, _UUID)
            uuids.append(uuid.value.decode("ascii", "replace"))
        return NvidiaDriver(tuple(uuids), text)
    finally:
        nvml.nvmlShutdown()


def count_cards() -> int | None:
    """Return the number of cards in the driver's library; None without a driver."""
    found = ask_driver()
    return None if found is None else len(found.uuids)


#: The file name of NVML, which NVIDIA's driver installs.
#: Source: NVML API Reference, "Installing".
_LIBRARY: Final = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
#: Bytes of the text of a UUID.
#: Source: ``NVML_DEVICE_UUID_V2_BUFFER_SIZE`` of ``nvml.h``.
_UUID: Final = 96
