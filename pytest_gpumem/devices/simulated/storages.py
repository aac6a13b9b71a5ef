"""Storages on a simulated card: CPU storages that hold bytes of the card.

``torch.load``, ``torch.save`` and safetensors use storages, not tensors. A storage must
therefore be able to move to a card, to report its device, and to move back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.capture import check_copy
from pytest_gpumem.devices.simulated.copies import mark_pinned
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.memory import (
    HOST_ROOM,
    Memory,
    check_resizable,
    hold,
    memory_of,
)
from pytest_gpumem.devices.simulated.methods import cuda_device
from pytest_gpumem.devices.simulated.refusals import refuse_value
from pytest_gpumem.devices.simulated.tensor import DEVICES
from pytest_gpumem.devices.simulated.typed import check_storage

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.machine import SimulatedCard

_Storage: Final[Any] = torch.UntypedStorage
_original_new: Final[Any] = torch.UntypedStorage.__new__
_original_clone: Final[Any] = torch.UntypedStorage.clone
_original_device: Final[Any] = torch.UntypedStorage.device
_original_cpu: Final[Any] = torch.UntypedStorage.cpu
_original_to: Final[Any] = torch.UntypedStorage.to
_original_is_shared: Final[Any] = torch.UntypedStorage.is_shared
_original_data_ptr: Final[Any] = torch.UntypedStorage.data_ptr
_original_resize: Final[Any] = torch.UntypedStorage.resize_


def _device(self: torch.UntypedStorage) -> torch.device:
    memory = memory_of(self)
    if memory is not None:
        return DEVICES[memory.card.index]
    device: torch.device = _original_device.__get__(self)
    return device


def _new(
    kind: type, *args: Any, device: Any = None, **options: Any
) -> torch.UntypedStorage:
    """Run ``UntypedStorage(…, device=…)``; C++ would call the CUDA driver for a card."""
    target = None if device is None else cuda_device(device)
    if target is None:
        if device is not None:
            options["device"] = device
        made: torch.UntypedStorage = _original_new(kind, *args, **options)
        return made
    if args and not isinstance(args[0], int):
        return _upload(_original_new(kind, *args, **options), target)
    card = card_of(target.index)
    nbytes = options.get("size", args[0] if args else 0)
    return _empty(card, nbytes)


def _empty(card: SimulatedCard, nbytes: int) -> torch.UntypedStorage:
    """Return an uninitialised storage on a card; the card's bytes are taken first."""
    held = Memory(card, nbytes)
    with HOST_ROOM:
        made: torch.UntypedStorage = _original_new(
            _Storage, nbytes, device=card.value_device
        )
    hold(made, held)
    return made


def _clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
    memory = memory_of(self)
    if memory is None:
        copied: torch.UntypedStorage = _original_clone(self)
        return copied
    made = _empty(memory.card, self.nbytes())
    if memory.card.value_device != "meta":
        made.copy_(self)
    return made


def _host_copy(self: torch.UntypedStorage, *, waits: bool) -> torch.UntypedStorage:
    """Copy a storage to the host, to pinned memory unless the host waits.

    Source: ``_to`` of ``torch/_utils.py``.
    """
    if _original_device.__get__(self).type == "meta":
        refuse_value("copying a storage from the card to the host")
    memory = memory_of(self)
    if memory is not None:
        memory.card.check_context()
        check_copy(memory.card, is_pinned=not waits, waits=waits)
    copied: torch.UntypedStorage = _Storage(self.nbytes())
    torch.UntypedStorage.copy_(copied, self)
    if not waits:
        mark_pinned(torch.empty(0, dtype=torch.uint8).set_(copied))
    return copied


def _to(
    self: torch.UntypedStorage,
    *,
    device: Any,
    non_blocking: bool = False,
) -> torch.UntypedStorage:
    target = cuda_device(device)
    memory = memory_of(self)
    if target is None:
        if memory is None:
            there: torch.UntypedStorage = _original_to(self, device=device)
            return there
        return _host_copy(self, waits=not non_blocking)
    if memory is not None and memory.card is card_of(target.index):
        return self
    return _upload(self, target)


def _upload(self: torch.UntypedStorage, target: torch.device) -> torch.UntypedStorage:
    card = card_of(target.index)
    copied = _empty(card, self.nbytes())
    if card.value_device != "meta":
        copied.copy_(self)
    return copied


def _cuda(
    self: torch.UntypedStorage,
    device: Any = None,
    non_blocking: bool = False,  # noqa: ARG001, FBT001, FBT002  # torch's signature
) -> torch.UntypedStorage:
    return _to(self, device=DEVICES[card_of(None).index] if device is None else device)


def _cpu(self: torch.UntypedStorage) -> torch.UntypedStorage:
    if memory_of(self) is not None:
        return _host_copy(self, waits=True)
    copied: torch.UntypedStorage = _original_cpu(self)
    return copied


def _resize(self: torch.UntypedStorage, size: int) -> Any:
    memory = memory_of(self)
    if memory is None:
        return _original_resize(self, size)
    check_resizable(self)
    # The new bytes are taken first, then the data is copied, then the old bytes are freed.
    # Source: ``aten/src/ATen/native/cuda/Resize.cpp``, ``resize_bytes_cuda``.
    held = Memory(memory.card, size)
    with HOST_ROOM:
        _original_resize(self, size)
    hold(self, held)
    return self


def _is_shared(self: torch.UntypedStorage) -> bool:
    """Run ``UntypedStorage.is_shared``: ``THPStorage_isShared`` of ``StorageSharing.cpp``."""
    return memory_of(self) is not None or bool(_original_is_shared(self))


def _data_ptr(self: torch.UntypedStorage) -> int:
    memory = memory_of(self)
    if memory is not None and memory.card.value_device == "meta":
        return 0 if memory.block is None else memory.block.address
    pointer: int = _original_data_ptr(self)
    return pointer


_original_init: Final[Any] = torch.TypedStorage.__init__


def typed_init(
    self: torch.TypedStorage, *args: Any, device: Any = None, **options: Any
) -> None:
    """Run ``TypedStorage(…)``: on a card it wraps a new untyped storage.

    Raises:
        torch.OutOfMemoryError: The card has no room.
    """
    target = None if device is None else cuda_device(device)
    if target is None or options.get("wrap_storage") is not None:
        if device is not None:
            options["device"] = device
        _original_init(self, *args, **options)
        return
    dtype = options.get("dtype") or torch.get_default_dtype()
    if len(args) == 1 and isinstance(args[0], int):
        wrapped = _Storage(args[0] * dtype.itemsize, device=target)
    else:
        _original_init(self, *args, **options)
        wrapped = _upload(self._untyped_storage, target)
    internal = options.get("_internal", False)
    _original_init(self, wrap_storage=wrapped, dtype=dtype, _internal=internal)


_original_set: Final[Any] = torch.Tensor.set_


def _set(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Run ``Tensor.set_``, with a check: C++ sees a card's storage as a host storage.

    Raises:
        RuntimeError: The storage is on another device (torch's message).
    """
    source: Any = args[0] if args else options.get("source")
    if source is not None:
        check_storage(source, self.device)
    result: torch.Tensor = _original_set(self, *args, **options)
    return result


#: Methods replaced for every storage while the simulated device is installed.
EVERY_STORAGE: Final[dict[str, Any]] = {
    "device": property(_device),
    "is_cuda": property(lambda self: _device(self).type == "cuda"),
    "to": _to,
    "cuda": _cuda,
    "cpu": _cpu,
    "is_shared": _is_shared,
    "resize_": _resize,
    "data_ptr": _data_ptr,
    "clone": _clone,
    "__new__": staticmethod(_new),
}

#: Methods on storages that are replaced for every tensor.
EVERY_TENSORS_STORAGE: Final[dict[str, Any]] = {"set_": _set}
