"""What figures of a device are kept under."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.devices import Device


def environment_of(device: Device) -> str:
    """Return what figures of a device are kept under: card, backend, torch.

    Patch releases and local versions of torch share their figures.
    """
    import torch  # noqa: PLC0415  # there is a device

    names = list(dict.fromkeys(device.name(i) for i in range(device.device_count)))
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return f"{' + '.join(names)}, {device.kind}, torch {version}"
