"""Typed tensors: ``torch.cuda.FloatTensor`` and ``Tensor.type``.

This is an old way to specify dtype and device together, which existing code still uses.
In a build without CUDA the classes exist but cannot create tensors.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.tensor import DEVICES, SimulatedTensor

#: Dtypes by the name of their class without "Tensor". Source: ``torch/cuda/__init__.py``.
DTYPES: Final[dict[str, torch.dtype]] = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Bool": torch.bool,
}


class TypedTensor(type):
    """The metaclass of ``torch.cuda.FloatTensor`` and similar classes.

    A call of such a class creates a tensor on the current card, from sizes or from data, or
    empty. ``isinstance`` checks a tensor's dtype and device.
    """

    dtype: torch.dtype
    is_cuda = True
    is_sparse = False

    def __call__(cls, *args: Any) -> torch.Tensor:
        """Create a tensor on the thread's current card."""
        device = DEVICES[card_of(None).index]
        if len(args) == 1 and not isinstance(args[0], (int, torch.Size)):
            return torch.tensor(args[0], dtype=cls.dtype, device=device)
        sizes = args[0] if args and isinstance(args[0], torch.Size) else args
        return torch.empty(sizes, dtype=cls.dtype, device=device)

    def __instancecheck__(cls, instance: Any) -> bool:
        """Return whether an object is a tensor of this type on a card."""
        return isinstance(instance, SimulatedTensor) and instance.dtype == cls.dtype


def typed_tensors() -> dict[str, Any]:
    """Return the classes that ``torch.cuda`` gets."""
    return {
        f"{name}Tensor": TypedTensor(
            f"{name}Tensor", (), {"dtype": dtype, "__module__": "torch.cuda"}
        )
        for name, dtype in DTYPES.items()
    }


def wanted(dtype: Any) -> tuple[torch.dtype, bool | None]:
    """Return the target of ``Tensor.type``: a dtype, and whether it is on a card.

    None in place of the second value means that the tensor keeps its device.

    Raises:
        ValueError: There is no such type (torch's message).
    """
    if isinstance(dtype, torch.dtype):
        return dtype, None
    if isinstance(dtype, TypedTensor):
        return dtype.dtype, True
    text = dtype if isinstance(dtype, str) else f"{dtype.__module__}.{dtype.__name__}"
    name = text.rpartition(".")[2].removesuffix("Tensor")
    if name not in DTYPES:
        raise ValueError(f"invalid type: '{text}'")
    return DTYPES[name], text.startswith("torch.cuda.")
