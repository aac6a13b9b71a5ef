"""The operands of one call, unwrapped, and which card they live on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.machine import SimulatedCard


class Operands:
    """Unwraps the arguments of one call and notes which card they live on."""

    __slots__ = ("card", "host", "outer", "strays")

    def __init__(self) -> None:
        self.card: SimulatedCard | None = None
        self.host: torch.Tensor | None = None
        self.outer: dict[int, SimulatedTensor] = {}
        self.strays: SimulatedCard | None = None

    def unwrap(self, value: Any) -> Any:
        """Return an argument with values in the place of tensors of a card."""
        kind = type(value)
        if kind is not SimulatedTensor:
            if kind is list or kind is tuple:
                return kind([self.unwrap(item) for item in value])
            if not isinstance(value, torch.Tensor):
                return value
            if not isinstance(value, SimulatedTensor):  # nor of a user's class there
                self.host = value
                return value
        card = value._gpumem_card
        if self.card is None:
            self.card = card
        elif card is not self.card:
            self.strays = card
        inner = value._gpumem_value
        self.outer[id(inner)] = value
        return inner


def is_own_device(kwargs: dict[str, Any], card: SimulatedCard) -> bool:
    """Tell whether ``device=`` is what C++ takes for the tensor's own device.

    Operators that torch composes in C++ hand on ``tensor.options()``, in backward and
    out of it. Such options name a layout; a device that Python code asks for comes
    without one.
    """
    return kwargs["device"].type == card.value_device and (
        kwargs.get("layout") is not None or in_backward()
    )
