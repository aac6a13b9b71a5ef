"""Kernels of the CUDA dispatch key that create tensors on a simulated card.

They are registered with ``torch.library`` for the CUDA key. They are therefore found from
every thread and from C++ (``torch.zeros``, ``Tensor.to``, autograd), in builds with and
without CUDA.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from pytest_gpumem.devices.simulated import autocast
from pytest_gpumem.devices.simulated.machine import SimulatedCard, card_of
from pytest_gpumem.devices.simulated.memory import HOST_ROOM, Memory, hold
from pytest_gpumem.devices.simulated.operators import overloads
from pytest_gpumem.devices.simulated.operators.batching import (
    GRADIENTS_OF_VIEWS,
    by_slices,
)
from pytest_gpumem.devices.simulated.operators.out_checks import composed_outs, guarded
from pytest_gpumem.devices.simulated.operators.registry import OPERATORS
from pytest_gpumem.devices.simulated.refusals import refuse_value, refusing
from pytest_gpumem.devices.simulated.tensor import HANDLERS, make


def _new(
    card: SimulatedCard,
    size: Any,
    stride: Any,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format | None,
) -> torch.Tensor:
    """Return an uninitialised tensor; the card's bytes are taken before the values.

    Raises:
        torch.OutOfMemoryError: The card has no room.
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if stride is None:
        count = 1
        for length in size:
            count *= length
    else:
        count = 0 if 0 in size else 1
        for length, step in zip(size, stride, strict=True):
            count += max(length - 1, 0) * step if count else 0
    if count < 0:
        # Torch raises its own error for a negative size.
        return torch.empty(size, dtype=dtype)
    memory = Memory(card, count * dtype.itemsize)
    device = card.value_device
    with HOST_ROOM:
        if stride is None:
            value = torch.empty(
                size,
                dtype=dtype,
                device=device,
                memory_format=memory_format or torch.contiguous_format,
            )
        else:
            value = torch.empty_strided(size, stride, dtype=dtype, device=device)
    hold(value.untyped_storage(), memory)
    return make(value, card)


def _empty(
    size: Any,
    *,
    dtype: Any = None,
    layout: Any = None,  # noqa: ARG001  # the operator's signature
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> torch.Tensor:
    if pin_memory:
        raise RuntimeError("Only dense CPU tensors can be pinned")
    card = card_of(None if device is None else device.index)
    return _new(card, size, None, dtype, memory_format)


def _empty_strided(
    size: Any,
    stride: Any,
    *,
    dtype: Any = None,
    layout: Any = None,  # noqa: ARG001  # the operator's signature
    device: Any = None,
    pin_memory: Any = None,
) -> torch.Tensor:
    if pin_memory:
        raise RuntimeError("Only dense CPU tensors can be pinned")
    card = card_of(None if device is None else device.index)
    return _new(card, size, stride, dtype, None)


def _indices(operator: Any) -> Any:
    """Return a kernel that computes indices on the CPU and copies them to the card."""

    def kernel(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        options.pop("pin_memory", None)
        options.pop("layout", None)
        card = card_of(None if device is None else device.index)
        value = operator(*args, device=torch.device(card.value_device), **options)
        return make(value, card)

    return kernel


def _read(source: Any) -> Any:
    """Run ``_local_scalar_dense``, with which C++ reads a number below Python's dispatch.

    Examples are ``torch.LongTensor([x, y])``, and sequences of tensors as indices.

    Raises:
        NoValuesError: The card keeps no values.
    """
    if source._gpumem_value.is_meta:
        refuse_value("Tensor.item()")
    return source._gpumem_value.item()


def _own_kernel(operator: Any) -> Any:
    """Return a card's kernel, which calls the operator's handler."""
    return lambda *args, **options: HANDLERS[operator](args, options)


#: Operators that create tensors of quantized dtypes.
_QUANTIZED = ("_empty_affine_quantized", "_empty_per_channel_affine_quantized")


def _register_composed(library: torch.library.Library) -> None:
    """Register the Python kernels that replace C++ code above autograd."""
    for name, overload, operator in overloads():
        make_kernel = operator.composed or operator.formula
        kernel = guarded(overload, make_kernel and make_kernel(overload))
        if kernel:
            library.impl(name, kernel, "AutogradCUDA")
        beside = operator.beside_meta and operator.beside_meta(overload)
        if beside:
            library.impl(name, beside, "AutogradMeta")
    for name, overload in composed_outs():
        kernel = guarded(overload, None)
        if kernel and overload.overloadpacket.__name__ not in OPERATORS:
            library.impl(name, kernel, "AutogradCUDA")


def register_kernels() -> torch.library.Library:
    """Register the kernels; deleting the library removes them."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # In a CUDA build, torch warns that the kernels replace compiled ones.
        warnings.simplefilter("ignore")
        library.impl("empty.memory_format", _empty, "CUDA")
        library.impl("empty_strided", _empty_strided, "CUDA")
        library.impl("_local_scalar_dense", _read, "CUDA")
        for name in _QUANTIZED:
            library.impl(name, refusing("a quantized tensor"), "QuantizedCUDA")
        for name in ("tril_indices", "triu_indices"):
            operator = getattr(torch.ops.aten, name).default
            library.impl(name, _indices(operator), "CUDA")
        _register_composed(library)
        for name, overload, operator in overloads():
            if operator.has_cuda_kernel and not overload._schema.is_mutable:
                # Autograd decomposes an operator unless the backend has a kernel for it.
                library.impl(name, _own_kernel(overload), "CUDA")
            if operator.in_slices and not overload._schema.is_mutable:
                library.impl(name, by_slices(overload), "FuncTorchBatched")
        for name, rule in GRADIENTS_OF_VIEWS.items():
            library.impl(name, rule, "Batched")
        autocast.register_casts(library)
    return library
