"""Names the environment of measured figures: the key under which they are stored.

Also describes the machine on which they were measured.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from pytest_gpumem.devices.selection import torch_build

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.devices import Device
    from pytest_gpumem.records.run_record import Environment


def environment_of(device: Device) -> str:
    """Return the key under which a device's figures are stored: card, backend, torch.

    Patch releases and local versions of torch have the same key.
    """
    import torch

    names = [device.name(i) for i in range(device.device_count)]
    return environment_name(names, device.kind, torch.__version__)


def environment_name(names: Iterable[str], kind: str, torch_version: str) -> str:
    """Return the key under which the figures of the named cards are stored.

    Args:
        names: The cards' names; equal names count once. The cards need not exist yet.
        kind: ``"cuda"`` or ``"simulated"``.
        torch_version: A version in the format of ``torch.__version__``.
    """
    version = ".".join(torch_version.split("+", maxsplit=1)[0].split(".")[:2])
    return f"{' + '.join(dict.fromkeys(names))}, {kind}, torch {version}"


def facts_of(device: Device | None, backend: str) -> Environment:
    """Return the description of the machine and its cards for reports; sizes are bytes.

    Args:
        device: The cards; None if nothing in this process needed a device.
        backend: ``"cuda"``, ``"simulated"`` or ``"off"``.
    """
    from pytest_gpumem.records.run_record import CardFacts, Environment

    build = torch_build()
    indices = range(0 if device is None else device.device_count)
    return Environment(
        host=platform.node(),
        python=platform.python_version(),
        platform=platform.platform(),
        torch=None if build is None else build.version,
        backend=backend,  # type: ignore[arg-type]  # one of the three strings
        driver=driver_version() if backend == "cuda" else None,
        cards=tuple(
            CardFacts(
                device.name(index), device.total_bytes(index), device.budget(index)
            )
            for index in indices
            if device is not None
        ),
    )


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None if NVML does not report it."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001  # the other facts are useful without NVML
        return None
    return version.decode() if isinstance(version, bytes) else str(version)
