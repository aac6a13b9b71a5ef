"""What figures of a device are kept under, and the machine they were taken on."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from pytest_gpumem.devices.selection import torch_build

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.devices import Device
    from pytest_gpumem.records.run_record import Environment


def environment_of(device: Device) -> str:
    """Return what figures of a device are kept under: card, backend, torch.

    Patch releases and local versions of torch share their figures.
    """
    import torch

    names = [device.name(i) for i in range(device.device_count)]
    return environment_name(names, device.kind, torch.__version__)


def environment_name(names: Iterable[str], kind: str, torch_version: str) -> str:
    """Return what figures are kept under, of cards that need not be there yet.

    Args:
        names: The cards' names; equal ones count once.
        kind: ``"cuda"`` or ``"simulated"``.
        torch_version: As ``torch.__version__`` says it.
    """
    version = ".".join(torch_version.split("+", maxsplit=1)[0].split(".")[:2])
    return f"{' + '.join(dict.fromkeys(names))}, {kind}, torch {version}"


def facts_of(device: Device | None, backend: str) -> Environment:
    """Return the machine and its cards, as reports have them; sizes are bytes.

    Args:
        device: The cards; None where nothing in this process asked for one.
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
        backend=backend,  # type: ignore[arg-type]  # one of the three
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
    """Return the version of NVIDIA's driver; None where NVML does not tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001  # without NVML the rest is still worth having
        return None
    return version.decode() if isinstance(version, bytes) else str(version)
