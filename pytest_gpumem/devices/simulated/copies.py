"""Copies between host and cards, and between cards."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from pytest_gpumem.devices.simulated.capture import on_tape
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.memory import HOST_ROOM, Memory, hold
from pytest_gpumem.devices.simulated.refusals import refuse, refuse_layout, refuse_value
from pytest_gpumem.devices.simulated.subclasses import (
    are_transforms_active,
    runs_itself,
)
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.machine import SimulatedCard

_to_copy: Any = torch.ops.aten._to_copy.default  # the operator behind Tensor.to


class _DeviceArgument(threading.local):
    """Whether user code has passed ``device=``; this also applies in backward."""

    is_stated = False


_device_argument: Final = _DeviceArgument()


def is_asked_for() -> bool:
    """Return whether a tensor of a class with ``__torch_dispatch__`` is being moved.

    The argument ``device`` of such an operator then comes from the user. It is not the
    device that C++ sees for the tensors.
    """
    return _device_argument.is_stated


_functorch: Final[Any] = torch._C._functorch


def _is_traced() -> bool:
    """Return whether torch traces the operators of a program while it runs."""
    proxies = torch._C._TorchDispatchModeKey.PROXY  # no public API
    if torch._C._get_dispatch_mode(proxies) is not None:
        return True
    if not are_transforms_active():
        return False
    top = _functorch.peek_interpreter_stack()
    return bool(top.key() == _functorch.TransformType.Functionalize)


def _is_in_kernel() -> bool:
    """Return whether a transform of ``torch.func`` runs an operator's kernel.

    Inside such a kernel, operands no longer have the transform's wrappers of this
    level, so only operators that autograd records reach the transform.

    Source: ``keysToExcludeWhenEnteringDynamicLayer`` of
    ``aten/src/ATen/functorch/DynamicLayer.cpp``.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()  # no public API
    entered: bool = excluded.has(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)
    return entered


def _each_moved(
    source: torch.Tensor, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    """Copy a batch that ``is_grads_batched`` and similar options represent as one tensor.

    Source: ``torch/_vmap_internals.py``.
    """
    level = torch._C._vmapmode_increment_nesting() - 1  # no public API
    torch._C._vmapmode_decrement_nesting()
    # As in torch/_vmap_internals.py.
    batch = torch._remove_batch_dim(source, level, 1, 0)
    batch = moved(batch, device, dtype=dtype)
    return torch._add_batch_dim(batch, 0, level)  # as in torch/_vmap_internals.py


def upload(
    source: torch.Tensor,
    card: SimulatedCard,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> SimulatedTensor:
    """Copy a host tensor to a card; the dtype is converted on the host.

    Source: ``aten/src/ATen/native/cuda/Copy.cu``: for a copy from the host, the dtype is
    converted before the transfer, so nothing else is allocated on the card.

    Raises:
        NotImplementedError: The source is a meta tensor (torch's message).
        torch.OutOfMemoryError: The card has no room; nothing was copied.
        UnsupportedOnSimulatedDeviceError: The source is sparse, nested or quantized.
    """
    if source.is_meta:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    if source.is_nested:
        refuse("a nested tensor")
    if source.layout is not torch.strided:
        refuse_layout(source.layout)
    if source.is_quantized:
        refuse("a quantized tensor")
    dtype = source.dtype if dtype is None else dtype
    # A strided copy is dense, so its bytes are known before it is created.
    memory = Memory(card, source.numel() * dtype.itemsize)
    value = _copied(source.detach(), card, dtype=dtype, memory_format=memory_format)
    hold(value.untyped_storage(), memory)
    return make(value, card)


def _copied(source: torch.Tensor, card: SimulatedCard, **options: Any) -> torch.Tensor:
    """Return a copy with values, or with only a shape if the card keeps no values."""
    device = torch.device(card.value_device)
    with HOST_ROOM, on_tape(card):
        copied: torch.Tensor = _to_copy(source, device=device, **options)
    return copied


def download(
    source: SimulatedTensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    waits: bool = True,
) -> torch.Tensor:
    """Copy a tensor from its card to the host, or to ``device`` (cpu or meta).

    A source that is not dense is first copied to contiguous memory *on the card*, which
    takes bytes there, as on a real card. The result is pinned unless the host waits.

    Source: ``_to_copy`` of ``aten/src/ATen/native/TensorConversions.cpp``.

    Raises:
        NoValuesError: The values are needed, but the card keeps none.
        torch.AcceleratorError: This is a forked child of the process that used the card.
        torch.OutOfMemoryError: The card has no room for the contiguous copy.
    """
    value = source._gpumem_value  # private to this package
    if device is not None and device.type == "meta":
        return torch.empty_like(value, dtype=dtype, device=device)
    source._gpumem_card.check_context()  # private to this package
    if value.is_meta:
        refuse_value("copying a tensor from the card to the host")
    staging = None if _is_dense(value) else Memory(source._gpumem_card, value.nbytes)
    with on_tape(source._gpumem_card):
        host: torch.Tensor = _to_copy(value, dtype=dtype, memory_format=memory_format)
    del staging
    if not waits:
        mark_pinned(host)
    return host


def mark_pinned(tensor: torch.Tensor) -> None:
    """Mark the memory of a host tensor as pinned.

    Raises:
        RuntimeError: There is no card (torch's message).
    """
    card_of(None)
    tensor.untyped_storage()._gpumem_pinned = True  # type: ignore[attr-defined]  # an attribute of this package


def _is_dense(value: torch.Tensor) -> bool:
    """Return whether the elements fill their memory without gaps or overlap."""
    dense: bool = torch.ops.aten.is_non_overlapping_and_dense.default(value)
    return dense


def peer_copy(
    source: SimulatedTensor,
    card: SimulatedCard,
    *,
    dtype: torch.dtype | None = None,
) -> SimulatedTensor:
    """Copy a tensor to another card, or to its own card in another dtype.

    Raises:
        torch.OutOfMemoryError: The target card has no room.
    """
    dtype = source.dtype if dtype is None else dtype
    memory = Memory(card, source.numel() * dtype.itemsize)
    value = _copied(source._gpumem_value, card, dtype=dtype)  # private to this package
    hold(value.untyped_storage(), memory)
    return make(value, card)


class _RecordedMove(_SingleLevelFunction):
    """A copy to another device, for autograd when no transform is active.

    The gradient is copied back to the source's device. The tangent is copied with the
    tensor.
    """

    @staticmethod
    def forward(
        source: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype | None,
        memory_format: torch.memory_format,
        waits: bool,  # noqa: FBT001  # torch passes positional arguments
    ) -> torch.Tensor:
        return _move(source, device, dtype, memory_format, waits=waits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004  # torch's signature
        source, *ctx.goal = inputs
        ctx.device, ctx.dtype = source.device, source.dtype

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # the operator has one result
        return moved(grad, ctx.device, dtype=ctx.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_rest: Any) -> Any:
        device, dtype, memory_format, waits = ctx.goal
        return moved(
            tangent, device, dtype=dtype, memory_format=memory_format, waits=waits
        )


class _Move(_RecordedMove, torch.autograd.Function):
    """A copy to another device for ``torch.func``, which applies its transforms in turn."""

    @staticmethod
    def vmap(_info: Any, in_dims: Any, source: torch.Tensor, *goal: Any) -> Any:
        return _Move.apply(source, *goal), in_dims[0]  # type: ignore[no-untyped-call]  # torch has no type hints here


def _recorded(*operands: Any) -> Any:
    """Apply the copy as autograd does when no transform is active."""
    single: Any = _RecordedMove
    with enable_single_level_autograd_function():  # no public API
        return single.apply(*operands)


def _move(
    source: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
    *,
    waits: bool,
) -> torch.Tensor:
    """Copy a tensor to a device, without autograd."""
    if runs_itself(source) or _is_traced() or _is_in_kernel():
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if memory_format is not torch.preserve_format:
            options["memory_format"] = memory_format
        if not waits:
            options["non_blocking"] = True
        is_outer, _device_argument.is_stated = _device_argument.is_stated, True
        try:
            moved: torch.Tensor = _to_copy(source, device=device, **options)
        finally:
            _device_argument.is_stated = is_outer
        return moved
    if device.type == "cuda":
        card = card_of(device.index)
        if isinstance(source, SimulatedTensor):
            return peer_copy(source, card, dtype=dtype)
        return upload(source, card, dtype=dtype, memory_format=memory_format)
    if isinstance(source, SimulatedTensor):
        return download(
            source,
            dtype=dtype,
            device=device,
            memory_format=memory_format,
            waits=waits,
        )
    return source.to(device, dtype)


def moved(
    source: torch.Tensor,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    waits: bool = True,
) -> torch.Tensor:
    """Copy a tensor to a device, with support for gradients, tangents and transforms.

    Unless the host waits, a copy to the host is pinned.

    Raises:
        torch.OutOfMemoryError: The target card has no room.
    """
    if _functorch.is_legacy_batchedtensor(source):
        return _each_moved(source, device, dtype)
    is_seen = source.requires_grad and torch.is_grad_enabled()
    is_dual = forward_ad._current_level >= 0  # no public API
    if is_seen or is_dual or (are_transforms_active() and not _is_traced()):
        apply: Any = _recorded if _is_in_kernel() else _Move.apply
        result: torch.Tensor = apply(source, device, dtype, memory_format, waits)
        return result
    return _move(source, device, dtype, memory_format, waits=waits)
