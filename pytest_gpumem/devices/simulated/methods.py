"""Methods of tensors that must know the simulated device.

There are two kinds. ``SimulatedTensor`` overrides some methods and attributes
(``device``, ``numpy``, ``repr``, pickling, …). Others are replaced for every tensor while
the device is installed, because the C++ code would call the CUDA driver (``to``,
``cuda``, ``data =``, …).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from contextlib import nullcontext
from textwrap import indent
from types import MethodType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._tensor_str import _add_suffixes, _tensor_str
from torch.nn.parameter import is_lazy
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.hooks import warn_if_has_hooks

from pytest_gpumem.devices.simulated.capture import (
    check_copy,
    check_waiting,
    note_wait,
)
from pytest_gpumem.devices.simulated.copies import mark_pinned, moved
from pytest_gpumem.devices.simulated.cpp_warnings import relayed, warn
from pytest_gpumem.devices.simulated.identity import (
    GRAD,
    become,
    deepcopy,
    is_parameter,
    register_hook,
)
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.memory import memory_of
from pytest_gpumem.devices.simulated.refusals import refuse, refuse_value, refusing
from pytest_gpumem.devices.simulated.subclasses import (
    as_class,
    known_card,
    runs_itself,
)
from pytest_gpumem.devices.simulated.tensor import (
    DEVICES,
    SimulatedTensor,
    attributes_of,
)
from pytest_gpumem.devices.simulated.typed import check_given, made_of, wanted

if TYPE_CHECKING:
    from collections.abc import Callable

_base: Final[Any] = torch.Tensor
_original_type: Final[Any] = torch.Tensor.type
_original_to: Final[Any] = torch.Tensor.to
# The descriptor behind Tensor.data.
_original_data: Final[Any] = torch._C.TensorBase.data
_original_pin: Final[Any] = torch.Tensor.pin_memory
_original_is_pinned: Final[Any] = torch.Tensor.is_pinned


class _Overridable:
    """A method of every tensor that ``__torch_function__`` of a class may override.

    It compares equal to torch's own method, because classes keep tables of such methods
    that were built before the replacement.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self.__name__ = method.__name__.removeprefix("as_")
        self._method = method
        self._original = getattr(torch.Tensor, self.__name__)

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        return self if tensor is None else MethodType(self, tensor)

    def __call__(self, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        if has_torch_function_unary(tensor):
            return handle_torch_function(self, (tensor,), tensor, *args, **options)
        if tensor.is_complex():  # C++ warns that the imaginary part is discarded
            return relayed(lambda: self._method(tensor, *args, **options))
        return self._method(tensor, *args, **options)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._original

    def __hash__(self) -> int:
        return hash(self._original)


# -- moves between devices ------------------------------------------------------------


def cuda_device(device: Any) -> torch.device | None:
    """Return ``device`` as a CUDA device with an index, or None if it is of another type.

    Accepts the same arguments as torch: a device, a string or an index.
    """
    if device is None:
        return None  # for example while a test has replaced the class ``torch.device``
    if isinstance(device, int) and not isinstance(device, bool):
        return DEVICES[card_of(device).index]
    if isinstance(device, str):
        if not device.startswith("cuda"):
            return None
        device = torch.device(device)
    if isinstance(device, torch.device) and device.type == "cuda":
        return DEVICES[card_of(device.index).index]
    return None


def _parse_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``Tensor.to``: device, dtype, copy, memory_format."""
    rest = list(args)
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    other = kwargs.get("other")
    if rest and isinstance(rest[0], torch.Tensor):
        other = rest.pop(0)
    elif rest and isinstance(rest[0], torch.dtype):
        dtype = rest.pop(0)
    elif rest:
        device = rest.pop(0)
        if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
            dtype = rest.pop(0)
    if other is not None:
        device, dtype = other.device, other.dtype
    copying = kwargs.get("copy", rest[1] if len(rest) > 1 else False)
    goes_on = kwargs.get("non_blocking", bool(rest) and rest[0])
    return {
        "device": device,
        "dtype": dtype,
        "waits": not goes_on,
        "copy": copying,
        "memory_format": kwargs.get("memory_format") or torch.preserve_format,
    }


def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run ``Tensor.to`` between host and simulated cards."""
    options = _parse_to(args, kwargs)
    device = options["device"]
    target = None if device is None else cuda_device(device)
    if isinstance(self, FakeTensor):
        if target is not None:
            # The program is traced and not run. C++ would abort for a fake tensor
            # on a card that takes part in autograd.
            options["device"] = target
            with torch.no_grad():
                return _to_dtype(self, options)
        traced: torch.Tensor = _original_to(self, *args, **kwargs)
        return traced
    on_card = self.is_cuda
    if target is None and (not on_card or device is None):
        if on_card and not runs_itself(self):
            return _to_dtype(self, options)
        there: torch.Tensor = _original_to(self, *args, **kwargs)
        return there
    goal = target if target is not None else torch.device(device)
    if on_card and goal == self.device:
        return _to_dtype(self, options)
    if "cpu" in (goal.type, self.device.type) and current_machine().is_watched:
        check_copy(
            card_of((target or self.device).index),
            is_pinned=not options["waits"] if on_card else is_pinned(self),
            waits=options["waits"],
        )
    del options["device"], options["copy"]
    return moved(self, goal, **options)


def _to_dtype(self: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    device_option = (options["device"],) if isinstance(self, FakeTensor) else ()
    result: torch.Tensor = _original_to(
        self,
        *device_option,
        self.dtype if options["dtype"] is None else options["dtype"],
        copy=options["copy"],
        memory_format=options["memory_format"],
    )
    return result


def cuda(
    self: torch.Tensor,
    device: Any = None,
    non_blocking: bool = False,  # noqa: FBT001, FBT002  # torch's signature
    memory_format: torch.memory_format = torch.preserve_format,
) -> torch.Tensor:
    """Run ``Tensor.cuda``: copy to a card."""
    target = DEVICES[card_of(None).index] if device is None else cuda_device(device)
    if target is None:
        raise RuntimeError(f"Invalid device, must be cuda device but got {device!r}")
    return to(self, target, non_blocking=non_blocking, memory_format=memory_format)


def cpu(
    self: torch.Tensor, memory_format: torch.memory_format = torch.preserve_format
) -> torch.Tensor:
    """Run ``Tensor.cpu``: copy to the host."""
    return to(self, torch.device("cpu"), memory_format=memory_format)


def as_type(
    self: torch.Tensor,
    dtype: Any = None,
    non_blocking: bool = False,  # noqa: FBT001, FBT002  # torch's signature
) -> Any:
    """Run ``Tensor.type``: return the type's name, or convert to another type."""
    if dtype is None:
        if not self.is_cuda or isinstance(self, FakeTensor):
            return _original_type(self)
        plain = torch.empty(0, dtype=self.dtype).type()
        return plain.replace("torch.", "torch.cuda.", 1)
    new, on_card = wanted(dtype)
    if on_card is None:
        return to(self, new)
    if not on_card:
        return to(self, torch.device("cpu"), new, non_blocking=non_blocking)
    device = self.device if self.is_cuda else DEVICES[card_of(None).index]
    return to(self, device, new, non_blocking=non_blocking)


def type_as(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Run ``Tensor.type_as``: convert to another tensor's dtype, on its device.

    Source: ``type_as`` of ``aten/src/ATen/native/TypeProperties.cpp``; C++ sees the host
    as the device of a card's tensor.
    """
    return to(self, other)


# -- data = ---------------------------------------------------------------------------


def _get_data(self: torch.Tensor) -> Any:
    return _original_data.__get__(self)


def _set_data(self: torch.Tensor, data: torch.Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass() if is_lazy(self) else nullcontext():
        become(self, data)


# -- pinned memory ----------------------------------------------------------------------


def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:  # noqa: ARG001  # torch's signature
    """Run ``Tensor.pin_memory``: return a host copy that is marked as pinned."""
    if isinstance(self, SimulatedTensor):
        raise RuntimeError(  # noqa: TRY004  # torch raises this class
            f"cannot pin '{self.type()}' only dense CPU tensors can be pinned"
        )
    if is_pinned(self):
        return self
    pinned = self.clone()
    mark_pinned(pinned)
    return pinned


def is_pinned(self: torch.Tensor, device: Any = None) -> bool:  # noqa: ARG001  # torch's signature
    """Run ``Tensor.is_pinned``: return whether the host memory was pinned.

    Memory that was registered with CUDA is pinned, too, if the storage begins in it.
    Source: ``CUDAHooks::isPinnedPtr`` of ``aten/src/ATen/cuda/detail/CUDAHooks.cpp``.
    """
    if isinstance(self, SimulatedTensor) or self.is_meta:
        return False
    storage = self.untyped_storage()
    if hasattr(storage, "_gpumem_pinned"):
        return True
    registered = current_machine().registered
    pointer = storage.data_ptr() if registered else 0
    return any(start <= pointer < start + size for start, size in registered.items())


#: Methods that are replaced for every tensor while the simulated device is installed.
EVERY_TENSOR: Final[dict[str, Any]] = {
    "data": property(_get_data, _set_data),
    "grad": GRAD,
    **{
        each.__name__.removeprefix("as_"): _Overridable(each)
        for each in (
            to,
            cuda,
            cpu,
            as_type,
            type_as,
            pin_memory,
            is_pinned,
            register_hook,
        )
    },
}


# -- methods of simulated tensors -------------------------------------------------------


def _device(self: SimulatedTensor) -> torch.device:
    return DEVICES[self._gpumem_card.index]  # private to this package


def _numpy(self: SimulatedTensor, *, force: bool = False) -> Any:
    if force:
        return cpu(self.detach()).numpy(force=True)
    return _refuse_array(self)


def _refuse_array(self: SimulatedTensor, *_args: Any, **_kwargs: Any) -> Any:
    raise TypeError(
        f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to "
        "copy the tensor to host memory first."
    )


def _on_cpu_alone(name: str) -> Callable[..., Any]:
    """Refuse a method that calls a Python function for each element, as C++ does.

    Source: ``torch/csrc/utils/tensor_apply.cpp``.
    """

    def refuse_it(*_args: Any, **_options: Any) -> Any:
        raise TypeError(f"{name} is only implemented on CPU tensors")

    return refuse_it


def _tolist(self: SimulatedTensor) -> Any:
    return cpu(self.detach()).tolist()


def _require_gradient(
    self: SimulatedTensor,
    requires_grad: bool = True,  # noqa: FBT001, FBT002  # torch's signature
) -> torch.Tensor:
    """Run ``requires_grad_``."""
    _check_recordable(self, requires_grad)
    return _require_gradient_in_cpp(self, requires_grad)


def _set_requires_grad(self: SimulatedTensor, value: Any) -> None:
    _check_recordable(self, value)
    _requires_grad.__set__(self, value)


def _check_recordable(tensor: torch.Tensor, requires_grad: Any) -> None:
    """Refuse gradients of a nested tensor, with which C++ would end the process."""
    if requires_grad and tensor.is_nested:
        refuse("a nested tensor while gradients are recorded")


_require_gradient_in_cpp: Final = torch.Tensor.requires_grad_
_requires_grad: Final[Any] = torch._C.TensorBase.requires_grad


def _show(self: SimulatedTensor, *, tensor_contents: Any = None) -> str:
    """Return the text that torch shows for a tensor on a card."""
    if not self.is_nested:
        return _repr(self, tensor_contents=tensor_contents)
    parts = ",\n".join(indent(repr(each), "  ") for each in self.unbind())
    return f"nested_tensor([\n{parts}\n], device='{self.device}')"


def _repr(self: SimulatedTensor, *, tensor_contents: Any = None) -> str:
    """Return the text that torch shows for a tensor on a card; the host waits for it."""
    value = self._gpumem_value.detach()  # private to this package
    suffixes = [f"device='{self.device}'"]
    default = torch.get_default_dtype()
    if value.is_meta:
        suffixes.append(f"size={tuple(value.shape)}")
        if value.dtype != default:
            suffixes.append(f"dtype={value.dtype}")
        text = "<no values kept>"
    elif value.numel() == 0:
        if value.dim() != 1:
            suffixes.append(f"size={tuple(value.shape)}")
        if value.dtype != default:
            suffixes.append(f"dtype={value.dtype}")
        text = "[]"
    else:
        if value.dtype not in (default, torch.int64, torch.bool):
            suffixes.append(f"dtype={value.dtype}")
        if not tensor_contents:
            card = self._gpumem_card  # private to this package
            card.check_context()
            note_wait(card.machine)
            check_waiting(card, card.machine.streams.current(card.index))
        text = tensor_contents or _tensor_str(value, len("tensor("))
    if self.grad_fn is not None:
        suffixes.append(f"grad_fn=<{type(self.grad_fn).__name__}>")
    elif self.requires_grad:
        suffixes.append("requires_grad=True")
    whole: str = _add_suffixes("tensor(" + text, suffixes, len("tensor("), False)
    return f"Parameter containing:\n{whole}" if is_parameter(self) else whole


def _format(self: SimulatedTensor, spec: str) -> str:
    if self.dim() == 0:
        return format(self.item(), spec)
    return format(repr(self), spec)


def _reduce_ex(self: SimulatedTensor, _protocol: Any) -> Any:
    """Pickle as a plain tensor or parameter on the card, with its attributes.

    Source: ``__reduce_ex__`` of ``torch/_tensor.py`` and ``torch/nn/parameter.py``.
    """
    if self._gpumem_value.is_meta:
        refuse_value("pickling a tensor")
    state = attributes_of(self)
    hooks: OrderedDict[Any, Any] = OrderedDict()
    rebuild: Any
    if is_parameter(self):
        args: tuple[Any, ...] = (self.detach(), self.requires_grad, hooks)
        if state:
            return torch._utils._rebuild_parameter_with_state, (*args, state)
        return torch._utils._rebuild_parameter, args
    warn_if_has_hooks(self)
    storage: Any = self.untyped_storage()
    is_new = self.dtype in torch.storage._new_dtypes()  # they have no typed storage
    rebuild = torch._utils._rebuild_tensor_v3
    if not is_new:
        rebuild = torch._utils._rebuild_tensor_v2
        storage = torch.storage.TypedStorage(
            wrap_storage=storage, dtype=self.dtype, _internal=True
        )
    layout = (self.storage_offset(), tuple(self.size()), self.stride())
    args = (storage, *layout, self.requires_grad, hooks)
    if is_new:
        args += (self.dtype,)
    bits = torch._utils.get_tensor_metadata(self)  # lazy conjugation and negation
    if bits:
        args += (bits,)
    if state:
        return torch._tensor._rebuild_from_type_v2, (rebuild, torch.Tensor, args, state)
    return rebuild, args


_set_bits: Final[Any] = torch._C._set_tensor_metadata  # type: ignore[attr-defined]  # no public API


def set_bits(tensor: torch.Tensor, bits: dict[str, bool]) -> None:
    """Mark an unpickled tensor and its value as lazily conjugated or negated."""
    _set_bits(tensor, bits)
    if isinstance(tensor, SimulatedTensor):
        _set_bits(tensor._gpumem_value, bits)


#: Source: ``tensor_ctor`` and ``new_tensor`` of ``torch/csrc/utils/tensor_new.cpp``.
COPYING: Final = (
    "To copy construct from a tensor, it is recommended to use "
    "sourceTensor.detach().clone() or "
    "sourceTensor.detach().clone().requires_grad_(True), rather than "
    "{}(sourceTensor)."
)


def _new_tensor(self: torch.Tensor, data: Any, **options: Any) -> torch.Tensor:
    if options.get("device") is None:
        options["device"] = self.device
    options["dtype"] = options.get("dtype") or self.dtype
    if not isinstance(data, torch.Tensor):
        return torch.tensor(data, **options)
    warn(COPYING.format("tensor.new_tensor"))
    requires_grad = options.pop("requires_grad", False)
    options.pop("pin_memory", None)
    return data.detach().to(**options, copy=True).requires_grad_(requires_grad)


_new_in_cpp: Final = torch.Tensor.new
_new_tensor_in_cpp: Final[Any] = torch.Tensor.new_tensor


def new_tensor(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """Run ``Tensor.new_tensor`` of any tensor; C++ would ask a driver for the card."""
    if has_torch_function_unary(self) or (
        not self.is_cuda and cuda_device(options.get("device")) is None
    ):
        made: torch.Tensor = _new_tensor_in_cpp(self, *args, **options)
        return made
    return _new_tensor(self, *args, **options)


def _new(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    if has_torch_function_unary(self) or not self.is_cuda:
        check_given(args[0] if len(args) == 1 else None, self.dtype, self.device)
        return _new_in_cpp(self, *args, **options)
    device = options.get("device")
    target = self.device if device is None else cuda_device(device)
    made = None if target is None else made_of(args, self.dtype, target)
    if made is not None:
        return made
    if target is None:
        return _new_in_cpp(self, *args, **options)
    # C++ of a CPU build knows no card by its number, and creates on the current one.
    options.pop("device", None)
    with torch.cuda.device(target):
        return _new_in_cpp(self, *args, **options)


def _share_memory(self: SimulatedTensor) -> SimulatedTensor:
    return self


def _record_stream(self: SimulatedTensor, stream: Any) -> None:
    """Run ``Tensor.record_stream``: the block waits for another stream's work."""
    memory = memory_of(self.untyped_storage())
    if memory is not None and memory.block is not None:
        with memory.card.locked() as allocator:
            allocator.record_stream(memory.block, stream.cuda_stream)


def _reader(name: str) -> Any:
    """Return a method that reads one value: torch's method, if the card keeps values."""
    original = getattr(_base, name)

    def read(self: SimulatedTensor, *args: Any) -> Any:
        if self._gpumem_value.is_meta:
            refuse_value(f"Tensor.{name}()")
        return original(self, *args)

    return read


def _data_ptr(self: SimulatedTensor) -> int:
    """Return the address of the values; without values, the address on the card."""
    if not self._gpumem_value.is_meta:
        pointer: int = self._gpumem_value.data_ptr()
        return pointer
    memory = memory_of(self._gpumem_value.untyped_storage())
    if memory is None or memory.block is None:
        return 0
    return memory.block.address + int(self.storage_offset()) * self.element_size()


#: ``kDLCUDA``. Source: ``dlpack.h``.
_DLPACK_CUDA: Final = 2

#: Methods that read a value in C++, before any operator is dispatched.
_READERS: Final = (
    "item",
    "__bool__",
    "__int__",
    "__float__",
    "__complex__",
    "__index__",
)

_ANSWERS: Final[dict[str, Any]] = {
    **{name: _reader(name) for name in _READERS},
    "is_meta": property(lambda _self: False),
    "data_ptr": _data_ptr,
    "record_stream": _record_stream,
    "device": property(_device),
    "is_cuda": property(lambda _self: True),
    "is_cpu": property(lambda _self: False),
    "get_device": lambda self: self.device.index,
    "numpy": _numpy,
    **{name: _on_cpu_alone(name) for name in ("apply_", "map_", "map2_")},
    "__array__": _refuse_array,
    "tolist": _tolist,
    "__cuda_array_interface__": property(refusing("tensor.__cuda_array_interface__")),
    "as_subclass": as_class,
    "__dlpack__": refusing("tensor.__dlpack__"),
    "__dlpack_device__": lambda self: (_DLPACK_CUDA, self.get_device()),
    "new": _new,
    "new_tensor": _new_tensor,
    "share_memory_": _share_memory,
    "is_shared": lambda _self: True,
    "requires_grad_": _require_gradient,
    "requires_grad": property(_requires_grad.__get__, _set_requires_grad),
    "__repr__": _show,
    "__format__": _format,
    "__deepcopy__": deepcopy,
    "__reduce_ex__": _reduce_ex,
    **EVERY_TENSOR,
}

for _name, _answer in _ANSWERS.items():
    setattr(SimulatedTensor, _name, _answer)


# -- methods of tensors of users' classes ---------------------------------------------


class _Attribute(property):
    """An attribute with a different value for tensors of users' classes on cards.

    Args:
        name: The name of the attribute.
        answer: Returns the value for a tensor on a card.
    """

    def __init__(self, name: str, answer: Callable[[Any, torch.device], Any]) -> None:
        original = getattr(torch.Tensor, name)

        def read(tensor: Any) -> Any:
            if has_torch_function_unary(tensor):
                public = getattr(torch.Tensor, name).__get__
                return handle_torch_function(public, (tensor,), tensor)
            device = known_card(tensor)
            return (
                original.__get__(tensor) if device is None else answer(tensor, device)
            )

        super().__init__(read, doc=original.__doc__)


def _method(name: str, answer: Callable[..., Any]) -> Any:
    """Return a method that is different for tensors of users' classes on cards."""
    original = getattr(torch.Tensor, name)

    @functools.wraps(original)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        is_other = not has_torch_function_unary(self) and known_card(self) is not None
        chosen = answer if is_other else original
        return chosen(self, *args, **options)

    return call


#: Attributes of ``SimulatedTensor`` that users' classes on cards have as well.
_SHARED: Final = (
    "__array__",
    "__dlpack__",
    "__dlpack_device__",
    "get_device",
    "is_shared",
    "numpy",
    "record_stream",
    "share_memory_",
    "tolist",
)

EVERY_TENSOR.update(
    {
        "device": _Attribute("device", lambda _self, device: device),
        "is_cuda": _Attribute("is_cuda", lambda _self, _device: True),
        "new": _new,
        "is_cpu": _Attribute("is_cpu", lambda _self, _device: False),
        "is_meta": _Attribute("is_meta", lambda _self, _device: False),
        "__cuda_array_interface__": _Attribute(
            "__cuda_array_interface__",
            lambda _self, _device: refuse("tensor.__cuda_array_interface__"),
        ),
        **{name: _method(name, _ANSWERS[name]) for name in _SHARED},
    }
)
