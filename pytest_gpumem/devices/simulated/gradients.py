"""Where gradients must be: what C++ checks of a real card's, and cannot see here.

C++ takes a card's tensors for ones on the host, and asks a subclass of tensors nothing.
So gradients that come from a user's Python code are held to their places here: those
given to ``backward``, those that a hook returns, those of a ``Function.backward``.

Source: ``validate_outputs`` of ``torch/csrc/autograd/engine.cpp``,
``check_variable_result`` of ``torch/csrc/autograd/variable.cpp``.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch.autograd.function import BackwardCFunction, _HookMixin

from pytest_gpumem.devices.simulated.backward import of_user
from pytest_gpumem.devices.simulated.copies import moved
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.tensor import HOST_KINDS, SimulatedTensor, make

_functorch: Final[Any] = torch._C._functorch


def is_batch(tensor: Any) -> bool:
    """Tell whether a tensor is of a transform that is at work: it lands later."""
    return bool(
        _functorch.is_functorch_wrapped_tensor(tensor)
        or _functorch.is_legacy_batchedtensor(tensor)
    )


def _place(value: Any) -> torch.device | None:
    """Return where a plain tensor is; None for what says nothing of the kind."""
    if isinstance(value, SimulatedTensor):
        return value.device
    if type(value) in HOST_KINDS and not is_batch(value):
        place: torch.device = value.device
        return place
    return None


def _on_card(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Return what C++ has made on the host, and makes on the card."""
    if tensor.requires_grad:
        return moved(tensor, place)
    return make(tensor.detach(), card_of(place.index))


def _in_place(
    grad: Any, wanted: torch.device | None, shape: torch.Size, what: str
) -> Any:
    """Return a gradient where it belongs: one number is copied there.

    Raises:
        RuntimeError: It has another shape than one number, and is elsewhere (torch's
            text).
    """
    __tracebackhide__ = True
    place = _place(grad)
    if wanted is None or place is None or place == wanted:
        return grad
    if not _can_be_summed_to(grad.shape, shape):
        return grad  # C++ says so first
    if not shape:
        return moved(grad.sum(), wanted)
    raise RuntimeError(f"{what} - expected device {wanted} but got {place}")


def _can_be_summed_to(given: torch.Size, wanted: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(given, wanted) == given)
    except RuntimeError:
        return False


# -- those given to backward ------------------------------------------------------------

_make_grads: Final[Any] = torch.autograd._make_grads


def make_grads(
    outputs: Any,
    grads: Any,
    is_grads_batched: bool,  # noqa: FBT001  # torch's signature
) -> tuple[Any, ...]:
    """``torch.autograd._make_grads``, which both ``backward`` and ``grad`` call.

    Raises:
        RuntimeError: A gradient is not where its output is (torch's text).
    """
    __tracebackhide__ = True
    made = _make_grads(outputs, grads, is_grads_batched)
    if is_grads_batched:
        return tuple(made)
    return tuple(
        _in_place(grad, _place(out), out.shape, f"invalid gradient at index {index}")
        if isinstance(out, torch.Tensor)
        else grad
        for index, (out, grad) in enumerate(zip(outputs, made, strict=True))
    )


# -- those that hooks return ------------------------------------------------------------


def check_hook(original: Any, result: Any, hook: Any) -> None:
    """Refuse a gradient of another kind of device than the one that a hook was given.

    Raises:
        RuntimeError: With torch's text.
    """
    __tracebackhide__ = True
    was, got = _place(original), _place(result)
    if was is None or got is None or was.type == got.type:
        return
    if "cuda" in {was.type, got.type}:  # C++ sees what is on neither
        raise RuntimeError(
            f"hook '{getattr(hook, '__name__', '<unknown>')}' has changed the type of "
            f"value (was {_type_of(original)} got {_type_of(result)})"
        )


def _type_of(tensor: torch.Tensor) -> str:
    """Return a type's name in C++.

    Source: ``toString`` of ``aten/src/ATen/core/DeprecatedTypeProperties.cpp``.
    """
    name: Any = tensor.type()
    if not tensor.is_meta:
        return str(name)
    return f"Meta{name.rpartition('.')[2].removesuffix('Tensor')}Type"


_register_hook: Final[Any] = _HookMixin._register_hook


def register_hook(backward_hooks: Any, hook: Any) -> Any:
    """What ``register_hook`` and ``register_prehook`` of a graph's node call.

    Both have the gradients first that the hook may replace.
    """

    def held(*grads: Any) -> Any:
        __tracebackhide__ = True
        grads = _of_one_node(grads)
        result = of_user(hook)(*grads)
        if isinstance(result, tuple):
            for original, each in zip(grads[0], result, strict=False):
                check_hook(original, each, hook)
        return result

    functools.update_wrapper(held, hook)
    held.__name__ = getattr(hook, "__name__", "<unknown>")
    return _register_hook(backward_hooks, held)


def _of_one_node(grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a node's gradients; where one is on a card, all with dimensions are.

    C++ makes some on the host. A node of Python's may lead from one device to another.
    """
    node: Any = torch._C._current_autograd_node()  # it has no public name
    if isinstance(node, BackwardCFunction):
        return grads
    flat = [each for group in grads for each in group]
    card = next((each for each in flat if isinstance(each, SimulatedTensor)), None)
    if card is None:
        return grads
    return tuple(
        tuple(
            _on_card(each, card.device)
            if each is not None
            and _place(each) != card.device
            and each.is_cpu
            and each.dim()
            else each
            for each in group
        )
        for group in grads
    )


# -- those of a user's Function -----------------------------------------------------------

_apply: Final[Any] = vars(torch.autograd.Function)["apply"].__func__
_apply_users: Final[Any] = of_user(BackwardCFunction.apply)


def apply(cls: Any, *args: Any, **options: Any) -> Any:
    """``Function.apply``, noting where its tensors are for the way back."""
    __tracebackhide__ = True
    results = _apply(cls, *args, **options)
    outputs = results if isinstance(results, tuple) else (results,)
    for each in outputs:
        node = each.grad_fn if isinstance(each, torch.Tensor) else None
        if getattr(node, "_forward_cls", None) is cls:
            ctx: Any = node
            ctx._gpumem_places = list(map(_note, args)), list(map(_place, outputs))
            break
    return results


def _note(value: Any) -> tuple[torch.device | None, torch.Size] | None:
    """Return where an argument is and its shape; None for what is no tensor."""
    return (_place(value), value.shape) if isinstance(value, torch.Tensor) else None


def apply_backward(self: Any, *grads: Any) -> Any:
    """``BackwardCFunction.apply``: gradients arrive and leave where their tensors are.

    Raises:
        RuntimeError: One leaves for another device (torch's text).
    """
    __tracebackhide__ = True
    places = getattr(self, "_gpumem_places", None)
    if places is None:
        return _apply_users(self, *grads)
    inputs, outputs = places
    grads = tuple(
        _on_card(grad, place)
        if place is not None
        and place.type == "cuda"
        and (there := _place(grad)) is not None
        and there.type == "cpu"
        else grad
        for grad, place in zip(grads, outputs, strict=True)
    )
    results = _apply_users(self, *grads)
    is_alone = not isinstance(results, tuple)
    made, index = [], 0
    for grad, note in zip((results,) if is_alone else results, inputs, strict=False):
        if note is None:
            made.append(grad)
            continue
        what = f"Function {self.name()} returned an invalid gradient at index {index}"
        place, shape = note
        made.append(_in_place(grad, place, shape, what))
        index += 1
    made += () if is_alone else results[len(made) :]
    return made[0] if is_alone and made else tuple(made)


# -- what is unpacked on the way back -------------------------------------------------------

_push_hooks: Final[Any] = torch._C._autograd._push_saved_tensors_default_hooks


def push_hooks(pack: Any, unpack: Any) -> None:
    """What ``saved_tensors_hooks`` calls: the second hook runs within backward."""
    _push_hooks(pack, of_user(unpack))


#: Owner, name and replacement of each.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (torch.autograd, "_make_grads", make_grads),
    (torch._C._autograd, "_push_saved_tensors_default_hooks", push_hooks),
    (_HookMixin, "_register_hook", staticmethod(register_hook)),
    (torch.autograd.Function, "apply", classmethod(apply)),
    (BackwardCFunction, "apply", apply_backward),
)
