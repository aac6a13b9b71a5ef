"""Keeps a tensor the same Python object when it changes its device.

Note [Bodies]
``tensor.data = other`` gives a tensor other memory, and the tensor keeps its identity: in
Python, and in C++. C++ may hold the tensor without a Python object, for example as the
gradient of another tensor, in a graph or in an accumulator. On the simulated device, C++
cannot turn a host tensor into a card's tensor: it can set the data, but not the keys that
dispatch operators. A tensor therefore has two bodies (C++ tensors), one for the host and
one for cards. Its Python object uses one of them, the active body, which is that of the
tensor's current device. Every change of device calls ``become``:

* The new active body gets the gradient, ``requires_grad``, the hooks and the version of
  the tensor. If the tensor is a gradient, C++ holds the previous body in the slot of the
  gradient's owner. The new active body replaces it there.
* The previous body is released. If C++ still holds it, it is kept and can become active
  again: if the tensor returns to the device, a graph made earlier finds its tensor again,
  as on a real card. An inactive body has no memory of its own; it holds the memory of
  the active body.

Limits: a graph that uses an inactive body raises an error about its shape; on a real card
the error is about the device, or there is none and the gradient stays on the device of the
graph. An inactive body does not keep the gradient of a deleted tensor. A view that changes
its device has its own version counter from then on.
"""

from __future__ import annotations

import copy
import functools
import weakref
from typing import Any, Final

import torch

from pytest_gpumem.devices.simulated.backward import of_user
from pytest_gpumem.devices.simulated.copies import moved
from pytest_gpumem.devices.simulated.cpp_warnings import relayed
from pytest_gpumem.devices.simulated.gradients import check_hook, is_batch
from pytest_gpumem.devices.simulated.memory import Memory, hold
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.subclasses import runs_itself
from pytest_gpumem.devices.simulated.tensor import (
    HOST_KINDS,
    SimulatedTensor,
    attributes_of,
    make,
    put_on_card,
    swap_bodies,
    take_off_card,
    without_references,
)

_base: Final[Any] = torch._C.TensorBase
_grad: Final[Any] = _base.grad  # the descriptor behind Tensor.grad
_data: Final[Any] = _base.data  # the descriptor behind Tensor.data
_swap: Final[Any] = torch._C._swap_tensor_impl  # the function that swap_tensors calls
_set_versions: Final[Any] = torch._C._autograd._unsafe_set_version_counter

#: Inactive bodies that C++ still holds, by the id of their tensor.
_bodies: Final[dict[int, torch.Tensor]] = {}
#: The base of each view that has changed its device, by the view's id. C++ keeps the base,
#: and so its memory, alive with the view. Source: ``VariableHooks::set_data``, of
#: ``torch/csrc/autograd/variable.cpp``, which replaces the data and keeps the autograd
#: metadata.
_bases: Final[dict[int, torch.Tensor]] = {}
#: Ids of the tensors that have a tensor as their gradient, by the id of the gradient.
_owners: Final[dict[int, set[int]]] = {}
#: A weak reference to each tensor in the tables of this module, by its id. There is one
#: per tensor, and it can be removed, because ``torch.utils.swap_tensors`` refuses tensors
#: with weak references.
_known: Final[dict[int, Any]] = {}


def _track(tensor: torch.Tensor) -> int:
    """Return a tensor's id, and remove its rows from the tables when it is deleted."""
    key = id(tensor)
    if key not in _known:
        _known[key] = weakref.ref(tensor, lambda _dead: _forget(key))
    return key


def _forget(key: int) -> None:
    _known.pop(key, None)
    _bodies.pop(key, None)
    _bases.pop(key, None)
    _owners.pop(key, None)


def become(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Give ``tensor`` the data of a tensor on another device: ``tensor.data = data``.

    The Python object stays the same: references from optimisers and modules, and weak
    references, stay valid.

    Raises:
        UnsupportedOnSimulatedDeviceError: The tensor would change its device, and it was
            computed with gradients.
    """
    was_on_card = isinstance(tensor, SimulatedTensor)
    is_on_card = isinstance(data, SimulatedTensor)
    if was_on_card is is_on_card:
        _data.__set__(tensor, data)
        if is_on_card:
            _take_value(tensor, data)
        if id(tensor) in _bodies:
            _keep_active_memory(tensor, _bodies[id(tensor)])
        return
    if tensor.grad_fn is not None:
        refuse("tensor.data = of another device, of a tensor computed with gradients")
    base = tensor._base
    if base is not None:
        _bases[_track(tensor)] = base
    _put_on(tensor, _body_for(tensor, data))


def _take_value(tensor: Any, data: Any) -> None:
    """Give a card's tensor an alias of another tensor's value."""
    put_on_card(tensor, data._gpumem_value.detach(), data._gpumem_card)


def _body_for(tensor: torch.Tensor, data: torch.Tensor) -> Any:
    """Return the inactive body of a tensor, after setting its data."""
    body: Any = _bodies.pop(id(tensor), None)
    if body is None:
        with torch.inference_mode(mode=False):
            # A new tensor has its own version counter.
            body = torch.empty(0, device="cpu")
        if isinstance(data, SimulatedTensor):
            body = make(body, data._gpumem_card)
    _data.__set__(body, data)
    if isinstance(data, SimulatedTensor):
        _take_value(body, data)
    if not (tensor.is_inference() or body.is_inference()):
        _set_versions((body,), (tensor._version,))
    if body.requires_grad is not tensor.requires_grad:
        body.requires_grad_(tensor.requires_grad)
    return body


def _put_on(tensor: Any, body: Any) -> None:
    """Make another body active for a Python object; keep the previous one if used."""
    grad = _grad.__get__(tensor)
    hooks = tensor._backward_hooks
    later_hooks = tensor._post_accumulate_grad_hooks
    _swap(tensor, body)
    _set_classes(tensor, body)
    if hooks is not None:
        tensor._backward_hooks = hooks  # in C++, hooks belong to a body
    if later_hooks is not None:
        tensor._post_accumulate_grad_hooks = later_hooks
    if grad is not None:
        _grad.__set__(body, None)
        _grad.__set__(tensor, grad)  # a module moves its gradient after the parameter
        _note_owner(grad, tensor)
    for owner in _owners_of(tensor):
        if _grad.__get__(owner) is body:
            _grad.__set__(owner, tensor)
    if body._use_count() > 1:
        _keep(tensor, body)


def _set_classes(tensor: Any, body: Any) -> None:
    """Set the classes of two Python objects after they have exchanged their bodies.

    An object of a user's class keeps its class; see Note [Tensors of users' classes].
    """
    if type(body) is SimulatedTensor:
        value, card = body._gpumem_value, body._gpumem_card
        take_off_card(body)
        _set_class(body, torch.Tensor)
        vars(body).clear()
        is_param = type(tensor) is torch.nn.Parameter
        if type(tensor) in HOST_KINDS:
            _set_class(tensor, SimulatedTensor)
        put_on_card(tensor, value, card, is_param=is_param)
        return
    card = tensor._gpumem_card
    if type(tensor) is SimulatedTensor:
        kind = torch.nn.Parameter if is_parameter(tensor) else torch.Tensor
        take_off_card(tensor)
        _set_class(tensor, kind)
    else:
        take_off_card(tensor)
    _set_class(body, SimulatedTensor)
    body._gpumem_card = card


def _set_class(tensor: Any, kind: type) -> None:
    """Set the class of a Python object."""
    tensor.__class__ = kind


def _keep(tensor: torch.Tensor, body: Any) -> None:
    """Keep an inactive body that C++ holds, without memory, while the tensor lives."""
    empty: Any = torch.empty(0, dtype=body.dtype, device="cpu")
    if isinstance(body, SimulatedTensor):
        empty = make(empty, body._gpumem_card)
        _take_value(body, empty)
    _data.__set__(body, empty)
    _keep_active_memory(tensor, body)
    _bodies[_track(tensor)] = body


def _keep_active_memory(tensor: torch.Tensor, body: torch.Tensor) -> None:
    """Let an inactive body keep the memory of the active body alive."""
    body.untyped_storage()._gpumem_active = tensor.untyped_storage()  # type: ignore[attr-defined]  # lives as long as the storage


# -- gradients ------------------------------------------------------------------------


def _note_owner(grad: torch.Tensor, owner: torch.Tensor) -> None:
    """Record whose gradient a tensor is, to update the owner's slot in C++ later."""
    owners = _owners.get(id(grad))
    if owners is None:
        owners = _owners[_track(grad)] = set()
    if id(owner) not in owners:
        owners.add(_track(owner))


def _owners_of(grad: torch.Tensor) -> list[Any]:
    """Return the tensors for which a tensor was recorded as the gradient."""
    references = [_known.get(key) for key in _owners.get(id(grad), ())]
    owners = [each() for each in references if each is not None]
    return [each for each in owners if each is not None]


def on_tensors_device(grad: Any, tensor: Any, *, is_given_back: bool = False) -> Any:
    """Return a gradient on the device of its tensor.

    C++ creates some gradients on the host. It also accepts a single number on the host as
    the gradient of a card's tensor.
    Source: ``validate_outputs`` of ``torch/csrc/autograd/engine.cpp``.

    Args:
        grad: The gradient.
        tensor: The tensor that the gradient belongs to.
        is_given_back: Whether the gradient is returned to the user. Zeros without memory
            are then returned as they are. As ``Tensor.grad`` they are copied:
            ``accumulateGrad`` of ``torch/csrc/autograd/functions/accumulate_grad.h``.
    """
    if runs_itself(grad) or grad.layout is not torch.strided:
        return grad
    if is_batch(grad) or is_batch(tensor):
        return grad
    on_card = isinstance(tensor, SimulatedTensor)
    if isinstance(grad, SimulatedTensor) is on_card:
        return grad
    if on_card:
        there = grad.detach()
        if there._is_zerotensor():
            there = there.clone()
            if is_given_back:
                hold(there.untyped_storage(), Memory(tensor._gpumem_card, 0))
        return make(there, tensor._gpumem_card)
    return moved(grad, tensor.device) if type(tensor) in HOST_KINDS else grad


_register_hook: Final[Any] = torch.Tensor.register_hook


def register_hook(self: torch.Tensor, hook: Any) -> Any:
    """Run ``Tensor.register_hook``: the hook gets a gradient on its tensor's device.

    C++ creates some gradients on the host, for example zeros with ``tensor.options()``.

    Raises:
        RuntimeError: In backward, if the hook returns a gradient on another device.
    """
    if not isinstance(self, SimulatedTensor):
        return _register_hook(self, _held(hook))
    card = self._gpumem_card
    # A leaf may be on another device when the hook runs. The hook must not keep the
    # leaf alive.
    key = _track(self) if self.is_leaf else None

    def moving(grad: Any) -> Any:
        reference = None if key is None else _known.get(key)
        tensor = None if reference is None else reference()
        if tensor is not None:
            grad = on_tensors_device(grad, tensor)
        elif key is None and type(grad) in HOST_KINDS and not is_batch(grad):
            grad = make(grad.detach(), card)
        result = of_user(hook)(grad)
        check_hook(grad, result, hook)
        return result

    return _register_hook(self, functools.update_wrapper(moving, hook))


def _held(hook: Any) -> Any:
    """Return a hook for a host tensor that checks that its result is on the host."""

    def held(grad: Any) -> Any:
        result = hook(grad)
        check_hook(grad, result, hook)
        return result

    return functools.update_wrapper(held, hook)


class _Grad:
    """``Tensor.grad`` of every tensor while cards are simulated.

    On the class it returns torch's own descriptor, because torch compares with it.
    """

    def __get__(self, tensor: Any, _owner: Any = None) -> Any:
        if tensor is None:
            return _grad
        is_warned_of = not (tensor.is_leaf or tensor.retains_grad)
        grad = (
            relayed(lambda: _grad.__get__(tensor))
            if is_warned_of
            else _grad.__get__(tensor)
        )
        if grad is not None:
            is_new = id(tensor) not in _owners.get(id(grad), ())
            if is_new:
                # This gradient was recorded earlier. A module moves it after its parameter.
                there = on_tensors_device(grad, tensor)
                if there is not grad:
                    _grad.__set__(tensor, there)
                    grad = there
            _note_owner(grad, tensor)
        return grad

    def __set__(self, tensor: Any, grad: Any) -> None:
        if isinstance(grad, torch.Tensor):
            _check_grad(tensor, grad)
            _note_owner(grad, tensor)
        _grad.__set__(tensor, grad)

    def __delete__(self, tensor: Any) -> None:
        _grad.__delete__(tensor)


def _check_grad(tensor: torch.Tensor, grad: torch.Tensor) -> None:
    """Refuse a gradient on another device.

    Source: ``THPVariable_set_grad`` of ``torch/csrc/autograd/python_variable.cpp``.

    Raises:
        RuntimeError: With torch's message.
    """
    if type(tensor) in HOST_KINDS and type(grad) in HOST_KINDS:
        return  # C++ makes this check itself
    mine, given = tensor.device, grad.device
    if mine.type != given.type:
        raise RuntimeError(
            f"attempting to assign a gradient with device type '{given.type}' to a "
            f"tensor with device type '{mine.type}'. Please ensure that the gradient "
            "and the tensor are on the same device"
        )
    if mine != given:
        raise RuntimeError(
            "attempting to assign a gradient located on device with index "
            f"{given.index} to a tensor located on device with index {mine.index}. "
            "Please ensure that the gradient and the tensor are on the same device"
        )


GRAD: Final = _Grad()


_autograd_grad: Final[Any] = torch.autograd.grad


@functools.wraps(_autograd_grad)
def autograd_grad(outputs: Any, inputs: Any, *args: Any, **options: Any) -> Any:
    """Run ``torch.autograd.grad``: each gradient is on the device of its input."""
    if isinstance(inputs, dict):
        named = _autograd_grad(outputs, inputs, *args, **options)
        return {name: _where_input_is(named[name], inputs[name]) for name in named}
    is_one = isinstance(inputs, (torch.Tensor, torch.autograd.graph.GradientEdge))
    # A generator, such as ``model.parameters()``, is read once.
    sources = (inputs,) if is_one else tuple(inputs)
    grads = _autograd_grad(outputs, sources, *args, **options)
    return tuple(map(_where_input_is, grads, sources))


def _where_input_is(grad: Any, source: Any) -> Any:
    if isinstance(grad, torch.Tensor) and isinstance(source, torch.Tensor):
        return on_tensors_device(grad, source, is_given_back=True)
    return grad


_swap_tensors: Final[Any] = torch.utils.swap_tensors


def swap_tensors(first: torch.Tensor, second: torch.Tensor) -> None:
    """Run ``torch.utils.swap_tensors``, and remove both tensors from the tables."""
    _forget(id(first))
    _forget(id(second))
    with without_references(first, second):
        _swap_tensors(first, second)


#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (torch.utils, "swap_tensors", swap_tensors),
    (torch._C, "_swap_tensor_impl", swap_bodies),
    (torch.autograd, "grad", autograd_grad),
)


# -- copies ---------------------------------------------------------------------------


def deepcopy(self: SimulatedTensor, memo: dict[int, Any]) -> Any:
    """Run ``copy.deepcopy`` of a tensor on a card.

    Source: ``Parameter.__deepcopy__`` of ``torch/nn/parameter.py`` (a parameter is
    cloned, without gradient and attributes); ``Tensor.__deepcopy__`` of
    ``torch/_tensor.py`` (a tensor keeps its view of a storage, which is copied once).

    Raises:
        RuntimeError: The tensor is part of a graph (torch's message).
        torch.OutOfMemoryError: The card has no room for the copy.
    """
    if is_parameter(self):
        if id(self) in memo:
            return memo[id(self)]
        data = self.data.clone(memory_format=torch.preserve_format)
        twin: Any = torch.nn.Parameter(data, self.requires_grad)
        memo[id(self)] = twin
        return twin
    if not self.is_leaf:
        raise RuntimeError(
            "Only Tensors created explicitly by the user (graph leaves) support the "
            "deepcopy protocol at the moment.  If you were attempting to deepcopy a "
            "module, this may be because of a torch.nn.utils.weight_norm usage, "
            "see https://github.com/pytorch/pytorch/pull/103001"
        )
    if id(self) in memo:
        return memo[id(self)]
    value, card = self._gpumem_value, self._gpumem_card
    storage = copy.deepcopy(self.untyped_storage(), memo)
    copied = torch.empty(0, dtype=value.dtype, device=value.device)
    torch._C.TensorBase.set_(
        copied, storage, value.storage_offset(), value.size(), value.stride()
    )
    twin = make(copied, card)
    with torch.no_grad():
        if self.is_conj():
            twin = twin.conj_physical()
        if self.is_neg():
            twin = twin.neg()
    if self.requires_grad:
        twin.requires_grad_()
    grad = _grad.__get__(self)
    if grad is not None:
        twin.grad = grad.__deepcopy__(memo)
    for name, each in copy.deepcopy(attributes_of(self), memo).items():
        setattr(twin, name, each)
    memo[id(self)] = twin
    return twin


def is_parameter(tensor: torch.Tensor) -> bool:
    """Return whether a tensor on a card is a parameter."""
    return isinstance(tensor, torch.nn.Parameter)
