"""Operators that copy between devices or change storages; each has its own handler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.copies import (
    download,
    is_asked_for,
    peer_copy,
    upload,
)
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.memory import Memory, hold
from pytest_gpumem.devices.simulated.operands import is_own_device
from pytest_gpumem.devices.simulated.operators.checks import first_operand_only
from pytest_gpumem.devices.simulated.operators.composing import refusal_of
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.refusals import refuse_value
from pytest_gpumem.devices.simulated.tensor import (
    SimulatedTensor,
    make,
    refresh,
)
from pytest_gpumem.devices.simulated.values import run

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.tensor import Handler

_copies: Any = torch.ops.aten._to_copy.default  # the operator's name
_set_storage: Any = torch._C.TensorBase.set_  # below Tensor.set_


def _to_copy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._to_copy``: a copy with a new dtype, layout or device."""
    source = args[0]
    device = kwargs.get("device")
    dtype = kwargs.get("dtype")
    memory_format = kwargs.get("memory_format") or torch.preserve_format
    if not isinstance(source, SimulatedTensor):
        index = None if device is None else device.index
        return upload(source, card_of(index), dtype=dtype, memory_format=memory_format)
    if device is None or (
        is_own_device(kwargs, source._gpumem_card) and not is_asked_for()
    ):
        value, card = source._gpumem_value, source._gpumem_card
        options = {"dtype": dtype, "memory_format": memory_format}
        copied = run(_copies, (value,), options, card, draw=None)
        return make(copied, card)
    if device.type == "cuda":
        return peer_copy(source, card_of(device.index), dtype=dtype)
    return download(
        source,
        dtype=dtype,
        device=device,
        memory_format=memory_format,
        waits=not kwargs.get("non_blocking"),
    )


def _copy_(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """Run ``aten.copy_``: an in-place copy between any two devices.

    Source: ``aten/src/ATen/native/cuda/Copy.cu``, ``copy_requires_temporaries``: a
    copy between host and card that changes the dtype, or is not dense on both sides,
    uses a contiguous buffer if the card's side is not contiguous.
    """
    target, source = args[0], args[1]
    staging = None
    if not isinstance(source, torch.Tensor):
        target._gpumem_value.fill_(source)  # the source is a number
    elif not isinstance(source, SimulatedTensor):
        # Without values, C++ creates the number of ``x[...] = 1`` on the meta device.
        keeps_none = target._gpumem_card.value_device == "meta" and not any(
            source.stride()
        )
        if source.is_meta and not keeps_none:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        # If C++ has expanded a number to the target's shape, a card only fills the target.
        is_number = not any(source.stride())
        if not target._gpumem_value.is_contiguous() and not is_number:
            staging = Memory(target._gpumem_card, target._gpumem_value.nbytes)
        target._gpumem_value.copy_(source)
    elif not isinstance(target, SimulatedTensor):
        if source._gpumem_value.is_meta:
            refuse_value("copying a tensor from the card to the host")
        if (
            not source._gpumem_value.is_contiguous()
            and source._gpumem_value.numel() > 1
        ):
            staging = Memory(source._gpumem_card, source._gpumem_value.nbytes)
        target.copy_(source._gpumem_value)
    else:
        target._gpumem_value.copy_(source._gpumem_value)
    del staging
    return target


def _set_(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten.set_``: give a tensor another storage, which may have to grow.

    Source: ``set_storage_cuda_`` of ``aten/src/ATen/native/cuda/TensorFactories.cu``.
    """
    target = args[0]
    source = args[1] if len(args) > 1 else kwargs.get("source")
    grown = _growth(target, source, *args[2:])
    if isinstance(source, SimulatedTensor):
        _set_storage(target._gpumem_value, source._gpumem_value, *args[2:])
    elif source is None:
        _set_storage(target._gpumem_value)
    else:
        _set_storage(target._gpumem_value, source, *args[2:])
    if grown is not None:
        hold(target._gpumem_value.untyped_storage(), grown)
    refresh(target)
    return target


def _growth(
    target: SimulatedTensor,
    source: Any,
    offset: int = 0,
    size: Any = (),
    stride: Any = (),
) -> Memory | None:
    """Take the bytes to enlarge a storage that is too small for its tensor."""
    if source is None or not size:
        return None
    storage = source.untyped_storage() if hasattr(source, "untyped_storage") else source
    shape = torch.empty(size, dtype=target.dtype, device="meta")
    if stride:
        shape = torch.empty_strided(size, stride, dtype=target.dtype, device="meta")
    nbytes = shape.untyped_storage().nbytes()
    nbytes += offset * target.element_size() if nbytes else 0
    return Memory(target._gpumem_card, nbytes) if nbytes > storage.nbytes() else None


def _is_pinned(_args: tuple[Any, ...], _kwargs: dict[str, Any]) -> bool:
    """Run ``aten.is_pinned``: memory on a card is never pinned."""
    return False


register("_to_copy", handler=_to_copy, source="TensorConversions.cpp, _to_copy")
register("copy_", handler=_copy_, source="cuda/Copy.cu, copy_requires_temporaries")
register(
    "set_", handler=_set_, source="cuda/TensorFactories.cu and TensorShape.cpp, set_"
)
register(
    "_resize_output_ resize_",
    resizes=True,
    source="cuda/Resize.cpp, resize_cuda_",
)


def _sized(func: Any, handler: Handler) -> Handler:
    """Run ``resize_as_``, which reads the second tensor's shape, on any device."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source, like, *rest = args
        if isinstance(source, SimulatedTensor):
            return handler(args, kwargs)
        return func(source, like._gpumem_value, *rest, **kwargs)

    return run


register(
    "resize_as_",
    resizes=True,
    check=first_operand_only,
    around=_sized,
    source="Resize.cpp, resize_as_",
)
register(
    """
    _make_per_channel_quantized_tensor _make_per_tensor_quantized_tensor
    quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic
    """,
    composed=refusal_of("a quantized tensor"),
    source="native_functions.yaml, QuantizedCUDA",
)
register("is_pinned", handler=_is_pinned, source="Memory.cpp, is_pinned")
# A copy of a dual number to the host compares both tensors' shapes and storages.
register("is_same_size", takes_host=True, source="native_functions.yaml, is_same_size")
register(
    "_has_same_storage_numel",
    takes_host=True,
    source="AutogradComposite.cpp, _has_same_storage_numel",
)


def _between_numbers(func: Any) -> Any:
    """Read the ends of a range from their devices, as ``linspace`` of tensors does.

    The result is on the device of the call, not on that of the ends.
    """
    if "Tensor" not in func._overloadname:
        return None

    def kernel(start: Any, end: Any, *rest: Any, **options: Any) -> Any:
        ends = (start, end)
        if any(isinstance(each, torch.Tensor) and each.is_meta for each in ends):
            start, end = (
                each.to("meta") if torch.is_tensor(each) else each for each in ends
            )
            return func(start, end, *rest, **options)
        if any(isinstance(each, torch.Tensor) and each.dim() for each in ends):
            start, end = (
                each.cpu() if torch.is_tensor(each) else each for each in ends
            )
            return func(start, end, *rest, **options)  # torch refuses these arguments
        start, end = (
            each.item() if isinstance(each, torch.Tensor) else each for each in ends
        )
        return func.overloadpacket(start, end, *rest, **options)

    return kernel


register(
    "linspace logspace",
    composed=_between_numbers,
    source="RangeFactories.cpp, linspace and logspace of tensors: start.item()",
)
