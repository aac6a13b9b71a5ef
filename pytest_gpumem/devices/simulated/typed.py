"""Typed tensors: ``torch.cuda.FloatTensor`` and ``Tensor.type``.

This is an old way to specify dtype and device together, which existing code still uses.
In a build without CUDA the classes exist but cannot create tensors.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch

from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.refusals import refuse
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


#: The names of dtypes in C++'s texts. Source: what torch 2.13 says.
_IN_CPP: Final = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "c10::Half",
    torch.bfloat16: "c10::BFloat16",
    torch.uint8: "unsigned char",
    torch.int8: "signed char",
    torch.int16: "short",
    torch.int32: "int",
    torch.int64: "long int",
    torch.bool: "bool",
}


def made_of(
    args: tuple[Any, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor | None:
    """Return what an old constructor makes of data or of a tensor; None for anything else.

    Source: ``legacy_tensor_generic_ctor_new`` in ``torch/csrc/utils/tensor_new.cpp``. A
    tensor is not copied, and must be of the same type. A sequence is data, also a tuple of
    numbers; sizes are numbers, or a ``torch.Size``.

    Args:
        args: The constructor's arguments.
        dtype: The constructor's dtype.
        device: The card for new data.

    Raises:
        TypeError: The argument is a tensor of another type, or no data.
    """
    if len(args) != 1:
        return None
    (given,) = args
    if isinstance(given, torch.Tensor):
        if given.dtype != dtype or not given.is_cuda:
            name = _IN_CPP.get(given.dtype, str(given.dtype))
            raise TypeError(
                f"expected {_options(_IN_CPP[dtype], 'cuda')} "
                f"(got {_options(name, given.device)})"
            )
        aliased: torch.Tensor = torch.ops.aten.alias(given)
        return aliased
    sizes_or_bytes = (torch.Size, torch.TypedStorage, torch.UntypedStorage)
    is_sequence = hasattr(given, "__getitem__") and not isinstance(given, dict)
    if isinstance(given, sizes_or_bytes) or not is_sequence or _is_number(given):
        return None
    return torch.tensor(given, dtype=dtype, device=device)


def _is_number(given: Any) -> bool:
    try:
        operator.index(given)
    except TypeError:
        return False
    return True


def _options(dtype: str, device: object) -> str:
    return (
        f"TensorOptions(dtype={dtype}, device={device}, layout=Strided, requires_grad=false "
        "(default), pinned_memory=false (default), memory_format=(nullopt))"
    )


class TypedTensor(type):
    """The metaclass of ``torch.cuda.FloatTensor`` and similar classes.

    A call of such a class creates a tensor on the current card, from sizes or from data, or
    empty. ``isinstance`` checks a tensor's dtype and device.
    """

    dtype: torch.dtype
    is_cuda = True
    is_sparse = False

    def __call__(cls, *args: Any, **options: Any) -> torch.Tensor:
        """Create a tensor on a card, by default on the thread's current card."""
        empty = torch.empty(0, dtype=cls.dtype, device=DEVICES[card_of(None).index])
        return empty.new(*args, **options)

    def __instancecheck__(cls, instance: Any) -> bool:
        """Return whether an object is a tensor of this type on a card."""
        return isinstance(instance, SimulatedTensor) and instance.dtype == cls.dtype


class SparseTensor(TypedTensor):
    """The metaclass of ``torch.cuda.sparse.FloatTensor`` and similar classes.

    A call of such a class is refused, and no tensor is of it.
    """

    is_sparse = True

    def __call__(cls, *_args: Any, **_options: Any) -> torch.Tensor:
        """Refuse a sparse tensor of a card by its name."""
        refuse("a sparse tensor")

    def __instancecheck__(cls, instance: Any) -> bool:
        """Return False: there is no such tensor."""
        return False


def typed_tensors(
    module: str = "torch.cuda", kind: type[TypedTensor] = TypedTensor
) -> dict[str, Any]:
    """Return the classes that ``torch.cuda`` or ``torch.cuda.sparse`` gets."""
    return {
        f"{name}Tensor": kind(
            f"{name}Tensor", (), {"dtype": dtype, "__module__": module}
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
