"""Copies between host and cards, and between cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.memory import HOST_ROOM, Memory, hold
from pytest_gpumem.devices.simulated.refusals import refuse, refuse_value
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.machine import SimulatedCard

_to_copy: Any = torch.ops.aten._to_copy.default  # the operator below Tensor.to


def upload(
    source: torch.Tensor,
    card: SimulatedCard,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> SimulatedTensor:
    """Copy a host tensor to a card; a new dtype is made on the host.

    Source: ``aten/src/ATen/native/cuda/Copy.cu``: for a copy from the host types
    are converted before the transfer, so nothing else is allocated on the card.

    Raises:
        NotImplementedError: The source is a meta tensor (torch's text).
        torch.OutOfMemoryError: No room; nothing was copied.
        UnsupportedOnSimulatedDeviceError: The source is sparse or nested.
    """
    __tracebackhide__ = True
    if source.is_meta:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    if source.is_nested:
        refuse("a nested tensor")
    if source.layout is not torch.strided:
        refuse("a sparse tensor")
    dtype = source.dtype if dtype is None else dtype
    # A strided copy is dense, so the bytes are known before anything is made.
    memory = Memory(card, source.numel() * dtype.itemsize)
    value = _copied(source.detach(), card, dtype=dtype, memory_format=memory_format)
    hold(value.untyped_storage(), memory)
    return make(value, card)


def _copied(source: torch.Tensor, card: SimulatedCard, **options: Any) -> torch.Tensor:
    """Return what a card keeps of a copy: its values, or its shape alone."""
    place = torch.device(card.value_device)
    with HOST_ROOM:
        copied: torch.Tensor = _to_copy(source, device=place, **options)
    return copied


def download(
    source: SimulatedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    """Copy a tensor from its card to the host (or to ``device``: cpu or meta).

    A source that is not dense is first made contiguous *on the card*, which takes
    room there, as on a real one.

    Raises:
        NoValuesError: The card keeps no values, and they are wanted.
        torch.OutOfMemoryError: No room for the contiguous copy.
    """
    __tracebackhide__ = True
    value = source._value  # the device's own room
    if device is not None and device.type == "meta":
        return torch.empty_like(value, dtype=dtype, device=device)
    if value.is_meta:
        refuse_value("copying a tensor from the card to the host")
    staging = (
        None if _is_dense(value) else Memory(source._card, value.nbytes)
    )  # likewise
    host: torch.Tensor = _to_copy(value, dtype=dtype, memory_format=memory_format)
    del staging
    return host


def _is_dense(value: torch.Tensor) -> bool:
    """Tell whether the elements fill their memory without gap or overlap."""
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense.default(value)
    return dense


def peer_copy(
    source: SimulatedTensor,
    card: SimulatedCard,
    *,
    dtype: torch.dtype | None = None,
) -> SimulatedTensor:
    """Copy a tensor to another card (or to its own, as another dtype).

    Raises:
        torch.OutOfMemoryError: No room on the target.
    """
    __tracebackhide__ = True
    dtype = source.dtype if dtype is None else dtype
    memory = Memory(card, source.numel() * dtype.itemsize)
    value = _copied(source._value, card, dtype=dtype)  # the device's own room
    hold(value.untyped_storage(), memory)
    return make(value, card)


class _Move(torch.autograd.Function):
    """A copy to another device whose gradient travels back to where it came from."""

    @staticmethod
    def forward(
        ctx: Any, source: torch.Tensor, device: torch.device, options: dict[str, Any]
    ) -> torch.Tensor:
        __tracebackhide__ = True
        ctx.device, ctx.dtype = source.device, source.dtype
        return move(source, device, **options)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # one gradient
        return move(grad, ctx.device, dtype=ctx.dtype), None, None


def move(
    source: torch.Tensor,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    """Copy a tensor to a device, without autograd.

    Raises:
        torch.OutOfMemoryError: No room on the target.
    """
    __tracebackhide__ = True
    if device.type == "cuda":
        card = card_of(device.index)
        if isinstance(source, SimulatedTensor):
            return peer_copy(source, card, dtype=dtype)
        return upload(source, card, dtype=dtype, memory_format=memory_format)
    if isinstance(source, SimulatedTensor):
        return download(source, dtype=dtype, device=device, memory_format=memory_format)
    return source.to(device, dtype)


def moved(source: torch.Tensor, device: torch.device, **options: Any) -> torch.Tensor:
    """Copy a tensor to a device; gradients flow back.

    Raises:
        torch.OutOfMemoryError: No room on the target.
    """
    __tracebackhide__ = True
    if source.requires_grad and torch.is_grad_enabled():
        result: torch.Tensor = _Move.apply(source, device, options)  # type: ignore[no-untyped-call]  # torch's
        return result
    return move(source, device, **options)
