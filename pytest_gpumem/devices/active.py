"""The device that instruments use by default."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_gpumem.errors import DeviceUnavailableError

if TYPE_CHECKING:
    from pytest_gpumem.devices import Device

_real: Final[list[Device]] = []


def active_device() -> Device:
    """Return the device that "cuda" means now.

    It is the simulated machine if one is installed, or else the real cards.

    Raises:
        DeviceUnavailableError: There is no simulated machine and no real card.
    """
    import torch

    from pytest_gpumem.devices.simulated import machine

    simulated = machine.innermost_machine()
    if simulated is not None:
        from pytest_gpumem.devices.simulated.device import (
            SimulatedDevice,
        )

        if not simulated.cards:
            raise DeviceUnavailableError(f"no CUDA device: {simulated.why_none}")
        return SimulatedDevice(simulated)
    # Cards are counted without CUDA: see Note [When the variable is read].
    if not torch.cuda.device_count():
        raise DeviceUnavailableError(
            "no CUDA device: torch finds none and no simulated one is installed; put "
            "'gpu_backend = auto' into pytest's ini file, or enter simulated_device()"
        )
    if not _real:
        from pytest_gpumem.devices.cuda import CudaDevice

        _real.append(CudaDevice())
    return _real[0]
