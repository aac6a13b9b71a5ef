"""Users' subclasses of ``torch.Tensor`` on simulated cards.

Note [Kinds of subclasses]
There are two kinds of classes, whose tensors are put on a card in different ways:

* A class with ``__torch_dispatch__`` runs its operators itself. A tensor that is made by
  ``_make_wrapper_subclass`` has no memory, but contains other tensors. In C++ the wrapper
  and the contained tensors are host tensors, because autograd would need a CUDA device
  guard otherwise. Python code sees the card, which is recorded on the wrapper's (empty)
  storage.
* A class without ``__torch_dispatch__`` has the operators of plain tensors. Its tensor on
  a card is a C++ tensor of the kind that ``tensor.py`` makes, with a Python object of the
  user's class. ``__torch_function__`` is called with it as with any tensor.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from pytest_gpumem.devices.simulated.fake_tensors import checked
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.memory import memory_of
from pytest_gpumem.devices.simulated.tensor import (
    DEVICES,
    HANDLERS,
    HOST_KINDS,
    ROWS,
    SimulatedTensor,
    has_own_dispatch,
    is_keyed,
    make,
    put_on_card,
    take_off_card,
)

_base: Final[Any] = torch._C.TensorBase
_no_dispatch: Final[Any] = torch._C._disabled_torch_dispatch_impl
_make_subclass: Final[Any] = torch.Tensor._make_subclass
_make_wrapper: Final[Any] = torch.Tensor._make_wrapper_subclass
_new_parameter: Final[Any] = torch.nn.Parameter.__new__
_swap: Final[Any] = torch._C._swap_tensor_impl
_alias: Final[Any] = torch.ops.aten.alias.default

#: Whether a transform of ``torch.func`` is active in the thread.
are_transforms_active: Final[Any] = torch._C._are_functorch_transforms_active

#: Classes of torch's tracing; their wrappers report the device that they represent.
_TRACING: Final = (FakeTensor, FunctionalTensor)


def is_of_user(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's class is neither torch's nor this package's."""
    kind = type(tensor)
    return kind is not SimulatedTensor and kind not in HOST_KINDS


def runs_itself(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's class defines its own ``__torch_dispatch__``."""
    return (
        is_of_user(tensor)
        and not isinstance(tensor, _TRACING)
        and has_own_dispatch(type(tensor))
    )


def known_card(tensor: torch.Tensor) -> torch.device | None:
    """Return the card of a tensor whose class does not report it, or None.

    Examples are tensors of users' classes, and the wrappers of ``torch.func``.
    """
    if type(tensor) in HOST_KINDS:
        return _place_inside(tensor) if are_transforms_active() else None
    with torch._C.DisableTorchFunctionSubclass():
        if not torch._C._has_storage(tensor):
            return None
        storage = tensor.untyped_storage()
        device: torch.device | None = getattr(storage, "_gpumem_device", None)
        if device is not None:
            return device
        # The inner tensor of a DTensor, which C++ creates.
        inner = getattr(tensor, "_local_tensor", None)
        if isinstance(inner, torch.Tensor):
            return inner.device if inner.is_cuda else None
        memory = memory_of(storage) if is_keyed(tensor) else None
    return None if memory is None else DEVICES[memory.card.index]


def _place_inside(tensor: torch.Tensor) -> torch.device | None:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # no public API
        tensor = torch._C._functorch.get_unwrapped(tensor)  # no public API
    if type(tensor) in HOST_KINDS:
        return None
    device = tensor.device
    return device if device.type == "cuda" else None


# -- construction ---------------------------------------------------------------------


def as_class(tensor: torch.Tensor, kind: Any) -> Any:
    """Return a card's tensor as an instance of another class, with the same memory.

    Source: ``THPVariable_as_subclass`` of ``torch/csrc/autograd/python_variable.cpp``.
    """
    with torch._C.DisableTorchFunctionSubclass():
        alias: Any = _alias(tensor)
    if kind is torch.Tensor or kind is SimulatedTensor:
        return alias
    return _of_class(alias, kind)


def _detached_as(tensor: torch.Tensor, kind: Any) -> Any:
    """Return a card's tensor as a detached instance of another class.

    Source: ``THPVariable_make_subclass`` of ``torch/csrc/autograd/python_variable.cpp``.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return _of_class(tensor.detach(), kind)


def _of_class(alias: Any, kind: Any) -> Any:
    """Set the class of a new tensor on a card to a user's class."""
    value, card = alias._gpumem_value, alias._gpumem_card
    take_off_card(alias)
    try:
        alias.__class__ = kind
    except TypeError:  # the class has slots
        shell = _make_subclass(kind, torch.empty(0, device="cpu"))
        _swap(shell, alias)
        alias = shell
    put_on_card(alias, value, card)
    return alias


def as_subclass(self: torch.Tensor, cls: Any) -> Any:
    """Run ``Tensor.as_subclass`` for a tensor on the host or on a card."""
    if isinstance(self, SimulatedTensor):
        return as_class(self, cls)
    return _base.as_subclass(self, cls)


def make_subclass(*args: Any, **options: Any) -> Any:
    """Run ``Tensor._make_subclass`` for a tensor on the host or on a card.

    The parameters are positional and without names, because TorchDynamo compares them.
    """
    data = args[1] if len(args) > 1 else options.get("data")
    wants_grad = args[2] if len(args) > 2 else options.get("require_grad", False)  # noqa: PLR2004  # the position of the argument
    if not isinstance(data, SimulatedTensor):
        made = _make_subclass(*args, **options)
        return checked(made) if wants_grad else made
    kind: Any = args[0] if args else options["cls"]
    if kind is torch.nn.Parameter:
        return torch.nn.Parameter(data, wants_grad)
    made = _detached_as(data, kind)
    with torch._C.DisableTorchFunctionSubclass():
        return made.requires_grad_(wants_grad)


def make_wrapper_subclass(cls: Any, size: Any, *args: Any, **options: Any) -> Any:
    """Run ``Tensor._make_wrapper_subclass``; see Note [Kinds of subclasses].

    Source of the position of ``device``: ``THPVariable_make_wrapper_subclass`` of
    ``torch/csrc/autograd/python_variable.cpp``.
    """
    device = args[5] if len(args) > 5 else options.get("device")  # noqa: PLR2004  # the position of ``device``
    named = None if device is None else torch.device(device)
    if named is None or named.type != "cuda" or issubclass(cls, _TRACING):
        return _make_wrapper(cls, size, *args, **options)
    if len(args) > 5:  # noqa: PLR2004  # the position of ``device``
        args = (*args[:5], torch.device("cpu"), *args[6:])
    else:
        options["device"] = torch.device("cpu")
    options.pop("dispatch_device", None)  # C++ must not see the card
    made = _make_wrapper(cls, size, *args, **options)
    return _placed(made, DEVICES[card_of(named.index).index])


def _placed(wrapper: Any, device: torch.device) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        wrapper.untyped_storage()._gpumem_device = device
    return wrapper


_Lazy: Final[Any] = torch.nn.parameter.UninitializedTensorMixin  # type: ignore[attr-defined]  # torch's stubs lack it
_materialize: Final[Any] = _Lazy.materialize


def materialize(self: Any, *args: Any, **options: Any) -> None:
    """Allocate a lazy module's parameter or buffer, and set its class on a card."""
    with torch._C.DisableTorchFunctionSubclass():
        _materialize(self, *args, **options)
    if is_keyed(self):
        is_param = type(self) is torch.nn.Parameter
        value, card = self._gpumem_value, self._gpumem_card
        take_off_card(self)
        self.__class__ = SimulatedTensor
        put_on_card(self, value, card, is_param=is_param)


def new_parameter(
    cls: Any,
    data: Any = None,
    requires_grad: bool = True,  # noqa: FBT001, FBT002  # torch's signature
) -> Any:
    """Run ``Parameter.__new__``: a subclass also accepts a card's plain tensor."""
    if type(data) is SimulatedTensor and cls is not torch.nn.Parameter:
        return _detached_as(data, cls).requires_grad_(requires_grad)
    return _new_parameter(cls, data, requires_grad)


# -- operators ------------------------------------------------------------------------


class _Dispatch:
    """The descriptor ``torch.Tensor.__torch_dispatch__``, which C++ reads on an object."""

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        if tensor is None:
            return _inherited  # the value for ``super()`` in a user's class
        if has_own_dispatch(type(tensor)) or not is_keyed(tensor):
            return _no_dispatch
        return SimulatedTensor.__torch_dispatch__


def _inherited(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Run ``super().__torch_dispatch__`` of a user's class as for plain tensors."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    if any(isinstance(each, torch.Tensor) and is_keyed(each) for each in leaves):
        return run_plain(func, *args, **(kwargs or {}))
    return _no_dispatch(func, types, args, kwargs or {})


def run_plain(func: Any, *args: Any, **options: Any) -> Any:
    """Run an operator on a card's tensors, and ignore the dispatch of their classes.

    On a real card, C++ calls the kernel in this case, without calling Python.
    """
    originals: dict[int, Any] = {}

    def plain(each: Any) -> Any:
        if not (runs_itself(each) and is_keyed(each)):
            return each
        simple = make(each._gpumem_value, each._gpumem_card)
        originals[id(simple)] = each
        return simple

    def original(each: Any) -> Any:
        return originals.get(id(each), each)

    tree_map = torch.utils._pytree.tree_map_only
    args, options = tree_map(torch.Tensor, plain, (args, options))
    result = HANDLERS[func](args, options)
    return tree_map(torch.Tensor, original, result)


#: Attributes that ``torch.Tensor`` has while cards are simulated.
EVERY_CLASS: Final[dict[str, Any]] = {
    **ROWS,
    "__torch_dispatch__": _Dispatch(),
    "_make_subclass": staticmethod(make_subclass),
    "_make_wrapper_subclass": staticmethod(make_wrapper_subclass),
    "as_subclass": as_subclass,
}

#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    *((torch.Tensor, name, value) for name, value in EVERY_CLASS.items()),
    (torch.nn.Parameter, "__new__", staticmethod(new_parameter)),
    (_Lazy, "materialize", materialize),
)
