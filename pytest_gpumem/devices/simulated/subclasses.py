"""Users' subclasses of ``torch.Tensor`` on simulated cards.

Note [Kinds of subclasses]
What a class says of itself decides how its tensors come to a card:

* With ``__torch_dispatch__`` it runs its operators itself. Made by
  ``_make_wrapper_subclass`` it has no memory, but others inside. C++ gets it as a
  tensor of the host, as it gets those inside: autograd would ask for a CUDA device
  guard. Python is told the card, which is noted on the wrapper's (empty) storage.
* Without, its operators are those of plain tensors. An object of it on a card is one
  body in C++ of the kind that ``tensor.py`` makes, and a Python object of the user's
  class; ``__torch_function__`` sees it as it would see any.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.memory import memory_of
from pytest_gpumem.devices.simulated.refusals import refuse
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

#: Whether a function of ``torch.func`` is at work in the thread.
are_transforms_active: Final[Any] = torch._C._are_functorch_transforms_active

#: Made by torch's own tracing, whose wrappers say what device they stand for.
_TRACING: Final = (FakeTensor, FunctionalTensor)


def is_of_user(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is of a class that is neither torch's own nor this one."""
    kind = type(tensor)
    return kind is not SimulatedTensor and kind not in HOST_KINDS


def runs_itself(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's class has a ``__torch_dispatch__`` of its own."""
    return (
        is_of_user(tensor)
        and not isinstance(tensor, _TRACING)
        and has_own_dispatch(type(tensor))
    )


def known_card(tensor: torch.Tensor) -> torch.device | None:
    """Return the card that a tensor is on, where its class does not say; else None.

    Such are tensors of users' classes, and what ``torch.func`` puts around tensors.
    """
    if type(tensor) in HOST_KINDS:
        return _place_inside(tensor) if are_transforms_active() else None
    with torch._C.DisableTorchFunctionSubclass():
        if not torch._C._has_storage(tensor):
            return None
        storage = tensor.untyped_storage()
        place: torch.device | None = getattr(storage, "_gpumem_place", None)
        if place is not None:
            return place
        inner = getattr(tensor, "_local_tensor", None)  # of a DTensor, made in C++
        if isinstance(inner, torch.Tensor):
            return inner.device if inner.is_cuda else None
        memory = memory_of(storage) if is_keyed(tensor) else None
    return None if memory is None else DEVICES[memory.card.index]


def _place_inside(tensor: torch.Tensor) -> torch.device | None:
    while torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    ):  # no public way to ask
        tensor = torch._C._functorch.get_unwrapped(tensor)  # likewise
    if type(tensor) in HOST_KINDS:
        return None
    place = tensor.device
    return place if place.type == "cuda" else None


# -- how they are made ----------------------------------------------------------------


def as_class(tensor: torch.Tensor, kind: Any) -> Any:
    """Return a tensor of a card as one of another class, over the same memory.

    Source: ``THPVariable_as_subclass`` of ``torch/csrc/autograd/python_variable.cpp``.
    """
    __tracebackhide__ = True
    with torch._C.DisableTorchFunctionSubclass():
        alias: Any = _alias(tensor)
    if kind is torch.Tensor or kind is SimulatedTensor:
        return alias
    return _of_class(alias, kind)


def _detached_as(tensor: torch.Tensor, kind: Any) -> Any:
    """Return a tensor of a card as one of another class, of which it is no view.

    Source: ``THPVariable_make_subclass`` of ``torch/csrc/autograd/python_variable.cpp``.
    """
    __tracebackhide__ = True
    with torch._C.DisableTorchFunctionSubclass():
        return _of_class(tensor.detach(), kind)


def _of_class(alias: Any, kind: Any) -> Any:
    """Give a new tensor of a card a user's class."""
    value, card = alias._gpumem_value, alias._gpumem_card
    take_off_card(alias)
    try:
        alias.__class__ = kind
    except TypeError:  # it has slots
        shell = _make_subclass(kind, torch.empty(0, device="cpu"))
        _swap(shell, alias)
        alias = shell
    put_on_card(alias, value, card)
    return alias


def as_subclass(self: torch.Tensor, cls: Any) -> Any:
    """``Tensor.as_subclass``, of a tensor of the host or of a card."""
    __tracebackhide__ = True
    if isinstance(self, SimulatedTensor):
        return as_class(self, cls)
    return _base.as_subclass(self, cls)


def make_subclass(*args: Any, **options: Any) -> Any:
    """``Tensor._make_subclass``, over a tensor of the host or of a card.

    It has torch's parameters without their names: TorchDynamo compares them.
    """
    __tracebackhide__ = True
    data = args[1] if len(args) > 1 else options.get("data")
    wants_grad = args[2] if len(args) > 2 else options.get("require_grad", False)  # noqa: PLR2004  # its position
    if not isinstance(data, SimulatedTensor):
        made = _make_subclass(*args, **options)
        return checked(made) if wants_grad else made
    kind: Any = args[0] if args else options["cls"]
    if kind is torch.nn.Parameter:
        return torch.nn.Parameter(data, wants_grad)
    return _detached_as(data, kind).requires_grad_(wants_grad)


def make_wrapper_subclass(cls: Any, size: Any, *args: Any, **options: Any) -> Any:
    """``Tensor._make_wrapper_subclass``; see Note [Kinds of subclasses].

    Source of the position of ``device``: ``THPVariable_make_wrapper_subclass`` of
    ``torch/csrc/autograd/python_variable.cpp``.
    """
    __tracebackhide__ = True
    device = args[5] if len(args) > 5 else options.get("device")  # noqa: PLR2004  # see above
    named = None if device is None else torch.device(device)
    if named is None or named.type != "cuda" or issubclass(cls, _TRACING):
        return _make_wrapper(cls, size, *args, **options)
    if len(args) > 5:  # noqa: PLR2004  # likewise
        args = (*args[:5], torch.device("cpu"), *args[6:])
    else:
        options["device"] = torch.device("cpu")
    options.pop("dispatch_device", None)  # C++ is not to know
    made = _make_wrapper(cls, size, *args, **options)
    return _placed(made, DEVICES[card_of(named.index).index])


def _placed(wrapper: Any, place: torch.device) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        wrapper.untyped_storage()._gpumem_place = place
    return wrapper


def new_parameter(
    cls: Any,
    data: Any = None,
    requires_grad: bool = True,  # noqa: FBT001, FBT002  # torch's signature
) -> Any:
    """``Parameter.__new__``: a subclass of it takes a plain tensor of a card as well."""
    __tracebackhide__ = True
    if type(data) is SimulatedTensor and cls is not torch.nn.Parameter:
        return _detached_as(data, cls).requires_grad_(requires_grad)
    return _new_parameter(cls, data, requires_grad)


def checked(tensor: Any) -> Any:
    """Refuse a fake tensor of a card that takes part in autograd: C++ would abort."""
    __tracebackhide__ = True
    if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
        refuse("FakeTensorMode.from_tensor")
    return tensor


def _require_grad_of_fake(self: Any, wanted: bool = True) -> Any:  # noqa: FBT001, FBT002  # torch's signature
    __tracebackhide__ = True
    return _base.requires_grad_(checked(self) if wanted else self, wanted)


def _set_grad_of_fake(self: Any, wanted: bool) -> None:  # noqa: FBT001  # a setter
    __tracebackhide__ = True
    _base.requires_grad.__set__(checked(self) if wanted else self, wanted)


# -- how their operators are run ------------------------------------------------------


class _Dispatch:
    """``torch.Tensor.__torch_dispatch__``: what C++ asks an object for."""

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        if tensor is None:
            return _inherited  # what ``super()`` of a user's class finds
        if has_own_dispatch(type(tensor)) or not is_keyed(tensor):
            return _no_dispatch
        return SimulatedTensor.__torch_dispatch__


def _inherited(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """``super().__torch_dispatch__`` in a user's class: what plain tensors do."""
    __tracebackhide__ = True
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    if any(isinstance(each, torch.Tensor) and is_keyed(each) for each in leaves):
        return run_plain(func, *args, **(kwargs or {}))
    return _no_dispatch(func, types, args, kwargs or {})


def run_plain(func: Any, *args: Any, **options: Any) -> Any:
    """Run an operator on tensors of cards, whatever their classes say.

    On a card its kernel is what C++ comes to where Python is not asked.
    """
    __tracebackhide__ = True
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


#: Placed in ``torch.Tensor`` while cards are simulated.
EVERY_CLASS: Final[dict[str, Any]] = {
    **ROWS,
    "__torch_dispatch__": _Dispatch(),
    "_make_subclass": staticmethod(make_subclass),
    "_make_wrapper_subclass": staticmethod(make_wrapper_subclass),
    "as_subclass": as_subclass,
}

#: Owner, name and replacement of each.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    *((torch.Tensor, name, value) for name, value in EVERY_CLASS.items()),
    (torch.nn.Parameter, "__new__", staticmethod(new_parameter)),
    (FakeTensor, "requires_grad_", _require_grad_of_fake),
    (
        FakeTensor,
        "requires_grad",
        property(_base.requires_grad.__get__, _set_grad_of_fake),
    ),
)
