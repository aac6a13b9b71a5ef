"""The unwrapped operands of one call, and their card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.machine import SimulatedCard


class Operands:
    """Unwraps the arguments of one call and records their card.

    Attributes:
        card: The card of the first tensor that is on one.
        host: A tensor on the host, if there is one.
        meta: Whether a tensor is on ``meta``.
        outer: The card's tensors, by the id of the tensors with their values.
        strays: Another card on which one of the tensors is; None if there is none.
    """

    __slots__ = ("card", "host", "meta", "outer", "strays")

    def __init__(self) -> None:
        self.card: SimulatedCard | None = None
        self.host: torch.Tensor | None = None
        self.meta = False
        self.outer: dict[int, SimulatedTensor] = {}
        self.strays: SimulatedCard | None = None

    def unwrap(self, value: Any) -> Any:
        """Return an argument in which a card's tensors are replaced by their values."""
        kind = type(value)
        if kind is not SimulatedTensor:
            if kind is list or kind is tuple:
                return kind([self.unwrap(item) for item in value])
            if not isinstance(value, torch.Tensor):
                return value
            if not isinstance(value, SimulatedTensor):  # it is on no card
                self.host = value
                self.meta = self.meta or value.is_meta
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
    """Return whether ``device=`` is the device that C++ sees for the tensor itself.

    Operators that torch composes in C++ pass on ``tensor.options()``, in backward and in
    forward. Such options include a layout; Python code that passes a device passes no
    layout.
    """
    return kwargs["device"].type == card.value_device and (
        kwargs.get("layout") is not None or in_backward()
    )
