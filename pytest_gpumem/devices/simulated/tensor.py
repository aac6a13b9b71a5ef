"""The tensor of the simulated CUDA device: bytes on a card, values on the CPU.

Note [How a simulated tensor is made]
A simulated tensor is an instance of a ``torch.Tensor`` subclass that ``_make_subclass``
creates from an ordinary CPU tensor, with the CUDA backend key in place of the CPU's. It
shares the CPU tensor's storage, so its shapes, strides, views and ``data_ptr`` are
correct. Its Python dispatch key sends every operator to ``dispatch.py``, which runs the
operator on the CPU tensors. The C++ device is still the CPU; otherwise autograd would need
a CUDA device guard, which a CPU build does not have. The attributes that Python code reads
(``device``, ``is_cuda``, …) are overridden in ``methods.py``.

Note [Tensors of users' classes]
A tensor of a user's subclass of ``torch.Tensor`` keeps its class when it is on a card.
C++ reads ``__torch_dispatch__`` on the *object*, and while cards are simulated it finds
the one of ``torch.Tensor`` (``subclasses.py``). The value and the card of the tensor
are in a table of this module, because user code may copy and replace the tensor's
``__dict__``. Those of a ``SimulatedTensor`` are in its ``__dict__``, where Python finds
them fastest. When code reads the ``__dict__``, they move to the table as well.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.memory import (
    Memory,
    charge,
    hold,
    lacks_host_memory,
    memory_of,
)
from pytest_gpumem.devices.simulated.refusals import refuse, refuse_layout
from pytest_gpumem.errors import HostMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

    Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]

# Torch creates its own subclasses with this function.
_make_subclass: Final[Any] = torch.Tensor._make_subclass
_set_data: Final[Any] = torch._C.TensorBase.data.__set__  # type: ignore[attr-defined]  # the setter behind Tensor.data
# Torch's function that disables __torch_function__.
_no_function: Final[Any] = torch._C._disabled_torch_function_impl
_keys: Final[Any] = torch._C._dispatch_keys
_CUDA: Final[Any] = torch._C.DispatchKey.CUDA
#: Classes whose tensors are always on the host.
HOST_KINDS: Final = frozenset({torch.Tensor, torch.nn.Parameter})


class _LastFailure(threading.local):
    """The text of this thread's last operator error, because C++ callers lose it."""

    def __init__(self) -> None:
        self.text = ""
        self.attributes: dict[str, Any] = {}

    def note(self, error: Exception) -> None:
        """Store an error's text, without its traceback, which would keep tensors alive."""
        self.text = str(error)
        self.attributes = dict(vars(error))


last_failure: Final = _LastFailure()
DEVICES: Final = tuple(torch.device("cuda", index) for index in range(64))


class _Handlers(dict[Any, "Handler"]):
    """The handler of each operator; ``dispatch.py`` makes it at the first call."""

    make: Callable[[Any], Handler]
    _wrapper: Callable[[Any, Handler], Handler] | None = None

    def __init__(self) -> None:
        super().__init__()
        self._plain: dict[Any, Handler] = {}

    def __missing__(self, func: Any) -> Handler:
        handler = self._plain.get(func)
        if handler is None:
            handler = self._plain[func] = self.make(func)
        if self._wrapper is not None:
            handler = self._wrapper(func, handler)
        self[func] = handler
        return handler

    def wrap(self, wrapper: Callable[[Any, Handler], Handler] | None) -> None:
        """Wrap the handler of every operator; None removes the wrapper."""
        self._wrapper = wrapper
        self.clear()


HANDLERS: Final = _Handlers()


def has_own_dispatch(kind: type) -> bool:
    """Return whether a class defines its own ``__torch_dispatch__``."""
    return any(
        "__torch_dispatch__" in vars(each)
        for each in kind.__mro__
        if each is not torch.Tensor
    )


def _dispatches(kind: type) -> bool:
    return kind is not SimulatedTensor and has_own_dispatch(kind)


def is_keyed(tensor: torch.Tensor) -> bool:
    """Return whether C++ dispatches a tensor's operators to CUDA."""
    found: bool = _keys(tensor).has(_CUDA)
    return found


class _OnCard(type(torch.Tensor)):  # type: ignore[misc]  # torch's metaclass has no public name
    """Makes ``isinstance`` true for every tensor on a card, also of users' classes."""

    def __instancecheck__(cls, instance: Any) -> bool:
        kind = type(instance)
        if kind is cls:
            return True
        return (
            kind not in HOST_KINDS
            and issubclass(kind, torch.Tensor)
            and not has_own_dispatch(kind)
            and is_keyed(instance)
        )


#: By the id of a tensor that has none of these in its ``__dict__``: its value, its card,
#: whether it is a parameter, and the weak reference whose callback removes the row.
_rows: Final[dict[int, tuple[torch.Tensor, SimulatedCard, bool, Any]]] = {}
#: The names of the package's own entries in the ``__dict__`` of a ``SimulatedTensor``,
#: which exist until code reads the ``__dict__``.
_OWN_NAMES: Final = ("_gpumem_value", "_gpumem_card", "_is_param")
#: The descriptor behind ``__dict__``.
_dict: Final[Any] = vars(torch.Tensor)["__dict__"]


def put_on_card(
    tensor: Any, value: torch.Tensor, card: SimulatedCard, *, is_param: bool = False
) -> None:
    """Record the value and the card of a tensor whose C++ tensor is already a card's.

    Args:
        tensor: The tensor.
        value: The CPU tensor with the values.
        card: The card.
        is_param: Whether a ``SimulatedTensor`` is a parameter.
    """
    key = id(tensor)
    if type(tensor) is not SimulatedTensor or key in _rows:
        is_param = is_param or (key in _rows and _rows[key][2])
        _record(tensor, value, card, is_param=is_param)
        return
    tensor._gpumem_value, tensor._gpumem_card = value, card
    if is_param:
        tensor._is_param = True  # torch marks parameters of subclasses in this way


def _record(
    tensor: Any, value: torch.Tensor, card: SimulatedCard, *, is_param: bool
) -> None:
    """Put a row into the table; it is removed when the tensor is deleted."""
    key = id(tensor)
    gone = weakref.ref(tensor, lambda _dead: _rows.pop(key, None))
    _rows[key] = value, card, is_param, gone


def take_off_card(tensor: Any) -> None:
    """Remove the record of a tensor's value and card."""
    if type(tensor) is SimulatedTensor:
        for name in _OWN_NAMES:
            _dict.__get__(tensor).pop(name, None)
    _rows.pop(id(tensor), None)


@contextmanager
def without_references(*tensors: Any) -> Iterator[None]:
    """Record tensors without weak references, because torch refuses to swap with them."""
    for each in tensors:
        if isinstance(each, SimulatedTensor):
            is_param = type(each) is SimulatedTensor and hasattr(each, "_is_param")
            value, card = each._gpumem_value, each._gpumem_card
            take_off_card(each)
            _rows[id(each)] = value, card, is_param, None
    try:
        yield
    finally:
        for each in tensors:
            row = _rows.pop(id(each), None)
            if row is not None:
                put_on_card(each, *row[:2], is_param=row[2])


_swap_bodies: Final[Any] = torch._C._swap_tensor_impl


def swap_bodies(first: Any, second: Any) -> None:
    """Exchange the C++ tensors of two objects, and their rows in the table."""
    _swap_bodies(first, second)
    pair = (first, second)
    found = [_rows.pop(id(each), None) for each in pair]
    for each, row in zip(pair, reversed(found), strict=True):
        if row is not None and row[3] is None:
            _rows[id(each)] = row
        elif row is not None:
            put_on_card(each, *row[:2], is_param=row[2])


def attributes_of(tensor: Any) -> dict[str, Any]:
    """Return a copy of a tensor's ``__dict__`` without this package's entries."""
    found: dict[str, Any] = dict(_dict.__get__(tensor))
    for name in _OWN_NAMES if type(tensor) is SimulatedTensor else ():
        found.pop(name, None)
    return found


class _Attributes:
    """``__dict__`` of a ``SimulatedTensor``: only the entries of torch and the user."""

    def __get__(self, tensor: Any, owner: Any = None) -> dict[str, Any]:
        found: dict[str, Any] = _dict.__get__(tensor)
        if "_gpumem_value" in found:
            value, card, is_param = (found.pop(each, None) for each in _OWN_NAMES)
            _record(tensor, value, card, is_param=bool(is_param))
        return found

    def __set__(self, tensor: Any, attributes: dict[str, Any]) -> None:
        self.__get__(tensor)
        _dict.__set__(tensor, attributes)


class _Row:
    """Descriptor of one column of the table of tensors.

    Raises:
        AttributeError: The tensor is not on a card, or is not a parameter.
    """

    def __init__(self, name: str, position: int) -> None:
        self._name = name
        self._position = position

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        if tensor is None:
            return None  # torch lists the attributes of its class
        row = _rows.get(id(tensor))
        if row is None:
            row = self._found(tensor)
        return row[self._position]

    def _found(self, tensor: Any) -> Any:
        """Return the row of a tensor that C++ has created on a card by itself."""
        with torch._C.DisableTorchFunctionSubclass():
            memory = memory_of(tensor.untyped_storage()) if is_keyed(tensor) else None
            if memory is None:
                raise AttributeError(
                    f"{type(tensor).__name__!r} object has no attribute {self._name!r}"
                )
            value = _alias(tensor, memory.card)
        put_on_card(tensor, value, memory.card)
        return value, memory.card


def _alias(tensor: torch.Tensor, card: SimulatedCard) -> torch.Tensor:
    """Return a host tensor that shares the memory of a card's tensor."""
    value = torch.empty(0, dtype=tensor.dtype, device=card.value_device)
    torch._C.TensorBase.set_(  # the method behind Tensor.set_
        value,
        tensor.untyped_storage(),
        tensor.storage_offset(),
        tensor.size(),
        tensor.stride(),
    )
    if tensor.is_conj():
        value = value.conj()
    return torch._neg_view(value) if tensor.is_neg() else value


#: Attributes that ``torch.Tensor`` has while cards are simulated.
ROWS: Final[dict[str, Any]] = {
    "_gpumem_value": _Row("_gpumem_value", 0),
    "_gpumem_card": _Row("_gpumem_card", 1),
}


class _IsParameter:
    """``_is_param`` of a ``SimulatedTensor``, by which torch recognises a parameter.

    Raises:
        AttributeError: The tensor is not a parameter.
    """

    def __get__(self, tensor: Any, owner: Any = None) -> bool:
        row = None if tensor is None else _rows.get(id(tensor))
        if row is None or not row[2]:
            raise AttributeError("_is_param")
        return True


class SimulatedTensor(torch.Tensor, metaclass=_OnCard):
    """A tensor on a simulated card; it behaves like a ``torch.Tensor`` on a real card."""

    # The CPU tensor with the values; it shares its storage with this one.
    _gpumem_value: torch.Tensor = ROWS["_gpumem_value"]
    # The card of the tensor.
    _gpumem_card: SimulatedCard = ROWS["_gpumem_card"]
    __dict__ = _Attributes()
    _is_param = _IsParameter()

    __torch_function__ = _no_function

    @staticmethod
    def __new__(
        cls: Any,
        data: torch.Tensor,
        requires_grad: bool = True,  # noqa: FBT001, FBT002  # nn.Parameter's signature
        **unknown: Any,
    ) -> Any:
        """Return a parameter: only ``type(parameter)(data, …)`` calls this method.

        Libraries also pass the contents of the parameter's ``__dict__``, as for classes
        with their own arguments.
        """
        if unknown:
            raise TypeError(
                "Parameter.__new__() got an unexpected keyword argument "
                f"'{next(iter(unknown))}'"
            )
        return torch.nn.Parameter(data, requires_grad)

    @staticmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls the method on the class
        func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator on the CPU, and allocate memory on the card for its results."""
        if len(types) > 1 and any(map(_dispatches, types)):
            return NotImplemented  # C++ would not call this method for plain tensors
        try:
            return HANDLERS[func](args, kwargs if kwargs is not None else {})
        except RuntimeError as error:
            last_failure.note(error)
            if not isinstance(
                error, (torch.OutOfMemoryError, torch.AcceleratorError)
            ) and not hasattr(error, "_gpumem_injected"):
                if lacks_host_memory(error):
                    del args, kwargs
                    error.__traceback__ = (
                        None  # so that the traceback does not keep operands alive
                    )
                    raise HostMemoryError from None
                raise
            # The error's traceback must not keep operands alive. On a real card there
            # are no frames below the caller's frame.
            del args, kwargs
            raise error.with_traceback(None)  # noqa: B904  # the same error is raised again


def make(value: torch.Tensor, card: SimulatedCard) -> SimulatedTensor:
    """Return ``value`` as a tensor on ``card``; allocate memory for a new storage.

    Args:
        value: A CPU (or meta) tensor that no other code will use.
        card: The card of the new tensor.

    Raises:
        torch.OutOfMemoryError: The card has no room for the storage.
        UnsupportedOnSimulatedDeviceError: The value is sparse, or it is nested while
            gradients are recorded.
    """
    if value.layout is not torch.strided:
        refuse_layout(value.layout)
    if value.is_nested and torch.is_grad_enabled():
        refuse("a nested tensor while gradients are recorded")
    storage = value.untyped_storage()
    if card.machine.streams.are_used:
        card.machine.streams.note_result(card.index)
    if not hasattr(storage, "_gpumem"):
        hold(storage, Memory(card, storage.nbytes()))
    device = DEVICES[card.index]
    tensor: SimulatedTensor
    if value.is_inference() and not torch.is_inference_mode_enabled():
        # A view of an inference tensor is an inference tensor.
        with torch.inference_mode():
            tensor = _make_subclass(
                SimulatedTensor, value, False, device_for_backend_keys=device
            )
    else:
        tensor = _make_subclass(
            SimulatedTensor, value, False, device_for_backend_keys=device
        )
    tensor._gpumem_value = value  # private to this package
    tensor._gpumem_card = card  # private to this package
    return tensor


def refresh(tensor: SimulatedTensor) -> None:
    """Update a tensor after the shape or storage of its value has changed.

    Raises:
        torch.OutOfMemoryError: The storage has grown, and the card has no room for it.
    """
    value = tensor._gpumem_value  # private to this package
    charge(value.untyped_storage(), tensor._gpumem_card)  # private to this package
    _set_data(tensor, make(value, tensor._gpumem_card))  # private to this package
