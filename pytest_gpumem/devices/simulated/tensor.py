"""The tensor of the simulated CUDA device: bytes on a card, values on the CPU.

Note [How a simulated tensor is made]
A simulated tensor is a ``torch.Tensor`` subclass made by ``_make_subclass`` over an
ordinary CPU tensor, with the CUDA backend key in place of the CPU's. It shares the
CPU tensor's storage, so shapes, strides, views and ``data_ptr`` are right without
being mirrored, and its Python dispatch key sends every operator to ``dispatch.py``,
which runs it on the CPU tensors. C++ still takes the tensor for one on the CPU, which
is what keeps autograd from asking for a CUDA device guard that is not there; what
Python sees (``device``, ``is_cuda``, …) is overridden in ``methods.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.memory import charge, lacks_host_memory
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

DEVICES: Final = tuple(torch.device("cuda", index) for index in range(64))


class _Handlers(dict[Any, "Handler"]):
    """How each operator is run; filled by ``dispatch.py`` as operators turn up."""

    make: Callable[[Any], Handler]

    def __missing__(self, func: Any) -> Handler:
        handler = self[func] = self.make(func)
        return handler


HANDLERS: Final = _Handlers()


class SimulatedTensor(torch.Tensor):
    """A tensor on a simulated card; answers as a ``torch.Tensor`` there does."""

    # The CPU tensor with the values; it shares its storage with this one.
    _value: torch.Tensor
    # The card the tensor lives on.
    _card: SimulatedCard

    __torch_function__ = _no_function

    @staticmethod
    def __new__(
        cls: Any,
        data: torch.Tensor,
        requires_grad: bool = True,  # noqa: FBT001, FBT002  # nn.Parameter's signature
    ) -> Any:
        """Return a parameter: only ``type(parameter)(data, …)`` comes here."""
        return torch.nn.Parameter(data, requires_grad)

    @staticmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it on the class
        func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator on the CPU and charge what it made to the card."""
        __tracebackhide__ = True
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
        charge(storage, card)
    tensor: SimulatedTensor = _make_subclass(
        SimulatedTensor, value, False, device_for_backend_keys=DEVICES[card.index]
    )
    tensor._value = value  # its maker
    tensor._card = card  # its maker
    return tensor


def refresh(tensor: SimulatedTensor) -> None:
    """Bring a tensor in line with its value after shape or storage changed.

    Raises:
        torch.OutOfMemoryError: The storage grew and the card has no room.
    """
    value = tensor._value  # its maker
    charge(value.untyped_storage(), tensor._card)  # its maker
    _set_data(tensor, make(value, tensor._card))  # its maker
