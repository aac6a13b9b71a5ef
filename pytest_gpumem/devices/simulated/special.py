"""Operators that cross devices or carry storages, run in their own way."""

from __future__ import annotations

from typing import Any

import torch

from pytest_gpumem.devices.simulated.dispatch import SPECIAL, handler_for, is_own_device
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.memory import Memory
from pytest_gpumem.devices.simulated.tensor import (
    SimulatedTensor,
    make,
    refresh,
)
from pytest_gpumem.devices.simulated.transfer import download, peer_copy, upload
from pytest_gpumem.errors import NoValuesError

_aten = torch.ops.aten


def _to_copy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``aten._to_copy``: a new dtype, layout or device."""
    source = args[0]
    device = kwargs.get("device")
    dtype = kwargs.get("dtype")
    memory_format = kwargs.get("memory_format") or torch.preserve_format
    if not isinstance(source, SimulatedTensor):
        index = None if device is None else device.index
        return upload(source, card_of(index), dtype=dtype, memory_format=memory_format)
    if device is None or is_own_device(kwargs, source._card):
        value = _aten._to_copy.default(  # the operator's name
            source._value, dtype=dtype, memory_format=memory_format
        )
        return make(value, source._card)
    if device.type == "cuda":
        return peer_copy(source, card_of(device.index), dtype=dtype)
    return download(source, dtype=dtype, device=device, memory_format=memory_format)


def _copy_(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """``aten.copy_``: in place, between any two devices.

    Source: ``aten/src/ATen/native/cuda/Copy.cu``, ``copy_requires_temporaries``: a
    copy between host and card that is not dense on both sides, or changes type, goes
    through a contiguous buffer where the card's side is not contiguous.
    """
    target, source = args[0], args[1]
    staging = None
    if not isinstance(source, torch.Tensor):
        target._value.fill_(source)  # a number
    elif not isinstance(source, SimulatedTensor):
        # Where no values are kept C++ makes the number of ``x[...] = 1`` on meta.
        keeps_none = target._card.value_device == "meta" and not any(source.stride())
        if source.is_meta and not keeps_none:
            raise NotImplementedError("Cannot copy out of meta tensor; no data!")
        if not target._value.is_contiguous() and source.dim() > 0:
            staging = Memory(target._card, target._value.nbytes)
        target._value.copy_(source)
    elif not isinstance(target, SimulatedTensor):
        if source._value.is_meta:
            raise NoValuesError("copying a tensor from the card to the host")
        if not source._value.is_contiguous() and source._value.numel() > 1:
            staging = Memory(source._card, source._value.nbytes)
        target.copy_(source._value)
    else:
        target._value.copy_(source._value)
    del staging
    return target


def _set_(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``aten.set_``: another storage under the same tensor."""
    target = args[0]
    source = args[1] if len(args) > 1 else kwargs.get("source")
    if isinstance(source, SimulatedTensor):
        target._value.set_(source._value, *args[2:])
    elif source is None:
        target._value.set_()
    else:
        target._value.set_(source, *args[2:])
    refresh(target)
    return target


def _is_pinned(_args: tuple[Any, ...], _kwargs: dict[str, Any]) -> bool:
    """``aten.is_pinned``: what lies on a card is never pinned."""
    return False


def _pack_padded_sequence(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """``aten._pack_padded_sequence``: lengths and batch sizes are the host's.

    Source: ``aten/src/ATen/native/PackedSequence.cpp``, ``checkLongTensor``.

    Raises:
        RuntimeError: The lengths lie on a card (torch's text).
    """
    source, lengths, batch_first = args
    if isinstance(lengths, SimulatedTensor):
        raise RuntimeError(  # noqa: TRY004  # torch's own class
            "'lengths' argument should be a 1D CPU int64 tensor, but got "
            f"{lengths.dim()}D {lengths.device} Long tensor"
        )
    data, batch_sizes = _aten._pack_padded_sequence.default(  # the operator's name
        source._value, lengths, batch_first
    )
    return make(data, source._card), batch_sizes


SPECIAL.update(
    {
        "_pack_padded_sequence": _pack_padded_sequence,
        "_to_copy": _to_copy,
        "copy_": _copy_,
        "set_": _set_,
        "is_pinned": _is_pinned,
    }
)

__all__ = ["handler_for"]
