"""Typed tensors: ``torch.FloatTensor``, ``torch.cuda.FloatTensor`` and ``Tensor.type``.

This is an old way to specify dtype and device together, which existing code still uses.
In a build without CUDA the classes of cards exist but cannot create tensors, and those of
the host accept a card's tensors, since C++ sees the host as their device.
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch

from pytest_gpumem.devices.simulated.cpp_warnings import warn
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.replaced_classes import ReplacementType
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
IN_CPP: Final = {
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
    """Return the result of an old constructor for data or a tensor; None for other input.

    Source: ``legacy_tensor_generic_ctor_new`` in ``torch/csrc/utils/tensor_new.cpp``. A
        tensor is not copied, and must have the same type. A sequence is data, even a
        tuple of numbers. Sizes are given as numbers or as a ``torch.Size``.

    Args:
        args: The constructor's arguments.
        dtype: The constructor's dtype.
        device: The card for new data.

    Raises:
        TypeError: The argument is a tensor of another type, or cannot be data.
        RuntimeError: The argument is a storage on another device.
    """
    if len(args) != 1:
        return None
    (given,) = args
    check_given(given, dtype, device)
    if isinstance(given, torch.Tensor):
        aliased: torch.Tensor = torch.ops.aten.alias(given)
        return aliased
    sizes_or_bytes = (torch.Size, torch.TypedStorage, torch.UntypedStorage)
    is_sequence = hasattr(given, "__getitem__") and not isinstance(given, dict)
    if isinstance(given, sizes_or_bytes) or not is_sequence or _is_number(given):
        return None
    return torch.tensor(given, dtype=dtype, device=device)


def check_given(given: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Check the argument of an old constructor: a tensor of its type, or a storage.

    If no card is involved, C++ checks tensors itself.

    Source: ``legacy_tensor_generic_ctor_new`` in ``torch/csrc/utils/tensor_new.cpp``, which
    compares the types of devices, and the dtypes of tensors.

    Raises:
        TypeError: A tensor is of another type (torch's message).
        RuntimeError: A storage is on another device (torch's message).
    """
    if isinstance(given, torch.Tensor):
        is_of_type = given.dtype == dtype and given.device.type == device.type
        if not is_of_type and "cuda" in {given.device.type, device.type}:
            expected = _options(IN_CPP.get(dtype, str(dtype)), device.type)
            name = IN_CPP.get(given.dtype, str(given.dtype))
            raise TypeError(f"expected {expected} (got {_options(name, given.device)})")
    elif isinstance(given, (torch.TypedStorage, torch.UntypedStorage)):
        check_storage(given, device)


def check_storage(storage: Any, device: torch.device) -> None:
    """Check that a new storage for a tensor is on the tensor's device.

    Source: ``checkSetStorage`` of ``aten/src/ATen/native/Resize.h``.

    Raises:
        RuntimeError: The storage is on another device (torch's message).
    """
    # A typed storage gives a warning.
    found = getattr(storage, "_untyped_storage", storage).device
    if found != device:
        raise RuntimeError(
            f'Attempted to set the storage of a tensor on device "{device}" to a '
            f'storage on different device "{found}".  This is no longer '
            "allowed; the devices must match."
        )


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
    layout = torch.strided
    is_cuda = True
    is_sparse = False

    def __call__(cls, *args: Any, **options: Any) -> torch.Tensor:
        """Create a tensor on a card, by default on the thread's current card.

        Source: ``Tensor_new`` of ``torch/csrc/tensor/python_tensor.cpp``.
        """
        warn(
            "The torch.cuda.*DtypeTensor constructors are no longer recommended. It's best "
            "to use methods such as torch.tensor(data, dtype=*, device='cuda') to create "
            "tensors.",
            once=True,
        )
        empty = torch.empty(0, dtype=cls.dtype, device=DEVICES[card_of(None).index])
        return empty.new(*args, **options)

    def __instancecheck__(cls, instance: Any) -> bool:
        """Return whether an object is a tensor of this type on a card."""
        return isinstance(instance, SimulatedTensor) and instance.dtype == cls.dtype


class SparseTensor(TypedTensor):
    """The metaclass of ``torch.cuda.sparse.FloatTensor`` and similar classes.

    A call of such a class is refused, and no tensor is an instance of it.
    """

    layout = torch.sparse_coo
    is_sparse = True

    def __call__(cls, *_args: Any, **_options: Any) -> torch.Tensor:
        """Refuse to create a sparse tensor on a card."""
        refuse("a sparse tensor")

    def __instancecheck__(cls, instance: Any) -> bool:
        """Return False, because there are no sparse tensors on a card."""
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


class HostTypedTensor(ReplacementType):
    """The metaclass of the replacements of ``torch.FloatTensor`` and similar classes."""

    def __call__(cls, *args: Any, **options: Any) -> Any:  # noqa: N805  # this is a metaclass
        """Create a tensor on the host; refuse a card's tensor or storage."""
        given = args[0] if len(args) == 1 else options.get("other")
        check_given(given, cls.original.dtype, _HOST)
        return cls.original(*args, **options)


_HOST: Final = torch.device("cpu")


def host_typed_tensors() -> dict[str, Any]:
    """Return the replacements of the host's typed tensor classes in ``torch``."""
    return {
        f"{name}Tensor": HostTypedTensor(
            f"{name}Tensor",
            (),
            {"original": vars(torch)[f"{name}Tensor"], "__module__": "torch"},
        )
        for name in DTYPES
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
