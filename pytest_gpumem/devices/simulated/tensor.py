"""The tensor of the simulated CUDA device: bytes on a card, values on the CPU.

Note [How a simulated tensor is made]
A simulated tensor is a ``torch.Tensor`` subclass made by ``_make_subclass`` over an
ordinary CPU tensor, with the CUDA backend key in place of the CPU's. It shares the
CPU tensor's storage, so shapes, strides, views and ``data_ptr`` are right without
being mirrored, and its Python dispatch key sends every operator to ``dispatch.py``,
which runs it on the CPU tensors. C++ still takes the tensor for one on the CPU, which
is what keeps autograd from asking for a CUDA device guard that is not there; what
Python sees (``device``, ``is_cuda``, …) is overridden in ``methods.py``.

Note [Tensors of users' classes]
An object of a user's subclass of ``torch.Tensor`` that lies on a card stays of that
class. C++ asks the *object* for ``__torch_dispatch__``, and ``torch.Tensor`` answers for
it while cards are simulated (``subclasses.py``). Its value and its card stand in a table
here: its ``__dict__`` is the user's own, to be copied and replaced.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.memory import (
    Memory,
    charge,
    hold,
    lacks_host_memory,
    memory_of,
)
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.errors import HostMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

    Handler = Callable[[tuple[Any, ...], dict[str, Any]], Any]

_make_subclass: Final[Any] = (
    torch.Tensor._make_subclass
)  # how torch's own subclasses are made
_set_data: Final[Any] = torch._C.TensorBase.data.__set__  # type: ignore[attr-defined]  # the setter below Tensor.data
_no_function: Final[Any] = (
    torch._C._disabled_torch_function_impl
)  # torch's word for "no __torch_function__"
_keys: Final[Any] = torch._C._dispatch_keys
_CUDA: Final[Any] = torch._C.DispatchKey.CUDA
#: Classes whose tensors are on the host, whatever their objects say.
HOST_KINDS: Final = frozenset({torch.Tensor, torch.nn.Parameter})

DEVICES: Final = tuple(torch.device("cuda", index) for index in range(64))


class _Handlers(dict[Any, "Handler"]):
    """How each operator is run; filled by ``dispatch.py`` as operators turn up."""

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
        """Run every operator through what a wrapper makes of its handler; None: as is."""
        self._wrapper = wrapper
        self.clear()


HANDLERS: Final = _Handlers()


def has_own_dispatch(kind: type) -> bool:
    """Tell whether a class says itself how its operators are run."""
    return any(
        "__torch_dispatch__" in vars(each)
        for each in kind.__mro__
        if each is not torch.Tensor
    )


def _dispatches(kind: type) -> bool:
    return kind is not SimulatedTensor and has_own_dispatch(kind)


def is_keyed(tensor: torch.Tensor) -> bool:
    """Tell whether C++ takes a tensor's operators for those of a card."""
    found: bool = _keys(tensor).has(_CUDA)
    return found


class _OnCard(type(torch.Tensor)):  # type: ignore[misc]  # torch's metaclass has no name
    """Makes ``isinstance`` mean: a tensor on a card, also one of a user's class."""

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


class SimulatedTensor(torch.Tensor, metaclass=_OnCard):
    """A tensor on a simulated card; answers as a ``torch.Tensor`` there does."""

    # The CPU tensor with the values; it shares its storage with this one.
    _gpumem_value: torch.Tensor
    # The card the tensor lives on.
    _gpumem_card: SimulatedCard

    __torch_function__ = _no_function

    @staticmethod
    def __new__(
        cls: Any,
        data: torch.Tensor,
        requires_grad: bool = True,  # noqa: FBT001, FBT002  # nn.Parameter's signature
        **kept: Any,
    ) -> Any:
        """Return a parameter: only ``type(parameter)(data, …)`` comes here.

        Libraries pass on what the parameter's ``__dict__`` has, as for classes with
        arguments of their own; a card's would be empty.
        """
        unknown = sorted(kept.keys() - OWN_NAMES)
        if unknown:
            raise TypeError(
                f"Parameter.__new__() got an unexpected keyword argument '{unknown[0]}'"
            )
        return torch.nn.Parameter(data, requires_grad)

    @staticmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it on the class
        func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator on the CPU and charge what it made to the card."""
        __tracebackhide__ = True
        if len(types) > 1 and any(map(_dispatches, types)):
            return NotImplemented  # to plain tensors of a card, C++ would not come
        try:
            return HANDLERS[func](args, kwargs if kwargs is not None else {})
        except RuntimeError as error:
            if not isinstance(
                error, (torch.OutOfMemoryError, torch.AcceleratorError)
            ) and not hasattr(error, "_gpumem_injected"):
                if lacks_host_memory(error):
                    del args, kwargs
                    error.__traceback__ = None  # for the same reason as below
                    raise HostMemoryError from None
                raise
            # The error's traceback must not keep operands alive: on a real card
            # nothing below the caller's own frame would.
            del args, kwargs
            raise error.with_traceback(None)  # noqa: B904  # the same error goes on


def make(value: torch.Tensor, card: SimulatedCard) -> SimulatedTensor:
    """Return ``value`` as a tensor of ``card``; charge its storage if it is new.

    Args:
        value: A CPU (or meta) tensor that nobody else will use.
        card: Where the tensor shall live.

    Raises:
        torch.OutOfMemoryError: The card has no room for the storage.
        UnsupportedOnSimulatedDeviceError: The value is sparse.
    """
    if value.layout is not torch.strided:
        refuse("a sparse tensor")
    storage = value.untyped_storage()
    if card.machine.streams.are_used:
        card.machine.streams.note_result(card.index)
    if not hasattr(storage, "_gpumem"):
        hold(storage, Memory(card, storage.nbytes()))
    tensor: SimulatedTensor = _make_subclass(
        SimulatedTensor, value, False, device_for_backend_keys=DEVICES[card.index]
    )
    tensor._gpumem_value = value  # its maker
    tensor._gpumem_card = card  # its maker
    return tensor


#: Value and card of the tensors of users' classes, by id; each with the reference that
#: takes its row out in time.
_rows: Final[dict[int, tuple[torch.Tensor, SimulatedCard, Any]]] = {}


def put_on_card(tensor: Any, value: torch.Tensor, card: SimulatedCard) -> None:
    """Note the value and the card of a tensor whose C++ side is a card's already."""
    if type(tensor) is SimulatedTensor:
        tensor._gpumem_value, tensor._gpumem_card = value, card
        return
    key = id(tensor)
    gone = weakref.ref(tensor, lambda _dead: _rows.pop(key, None))
    _rows[key] = value, card, gone


def take_off_card(tensor: Any) -> None:
    """Forget value and card of a tensor."""
    if type(tensor) is SimulatedTensor:
        for name in OWN_NAMES:
            tensor.__dict__.pop(name, None)
    _rows.pop(id(tensor), None)


#: What this package keeps in the ``__dict__`` of a ``SimulatedTensor``.
OWN_NAMES: Final = frozenset({"_gpumem_value", "_gpumem_card", "_is_param"})


class _Row:
    """``_gpumem_value`` and ``_gpumem_card`` of a tensor of a user's class on a card.

    Raises:
        AttributeError: The tensor is not on a card.
    """

    def __init__(self, name: str, position: int) -> None:
        self._name = name
        self._position = position

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        if tensor is None:
            return None  # torch lists what its class has
        row = _rows.get(id(tensor))
        if row is None:
            row = self._found(tensor)
        return row[self._position]

    def _found(self, tensor: Any) -> Any:
        """Return the row of a tensor that C++ has brought here by ways of its own."""
        with torch._C.DisableTorchFunctionSubclass():
            memory = memory_of(tensor.untyped_storage()) if is_keyed(tensor) else None
            if memory is None:
                raise AttributeError(
                    f"{type(tensor).__name__!r} object has no attribute {self._name!r}"
                )
            value = _alias(tensor, memory.card)
        put_on_card(tensor, value, memory.card)
        return _rows[id(tensor)]


def _alias(tensor: torch.Tensor, card: SimulatedCard) -> torch.Tensor:
    """Return a tensor of the host over the memory of one on a card."""
    value = torch.empty(0, dtype=tensor.dtype, device=card.value_device)
    torch._C.TensorBase.set_(  # below Tensor.set_
        value,
        tensor.untyped_storage(),
        tensor.storage_offset(),
        tensor.size(),
        tensor.stride(),
    )
    if tensor.is_conj():
        value = value.conj()
    return torch._neg_view(value) if tensor.is_neg() else value


#: What ``torch.Tensor`` answers with while cards are simulated.
ROWS: Final[dict[str, Any]] = {
    "_gpumem_value": _Row("_gpumem_value", 0),
    "_gpumem_card": _Row("_gpumem_card", 1),
}


def refresh(tensor: SimulatedTensor) -> None:
    """Bring a tensor in line with its value after shape or storage changed.

    Raises:
        torch.OutOfMemoryError: The storage grew and the card has no room.
    """
    value = tensor._gpumem_value  # its maker
    charge(value.untyped_storage(), tensor._gpumem_card)  # its maker
    _set_data(tensor, make(value, tensor._gpumem_card))  # its maker
