"""Checks the devices of gradients, which C++ checks only on a real card.

C++ sees a simulated card's tensors as host tensors, and makes no checks for a subclass of
Tensor. This module therefore checks the gradients that come from user code: those passed
to ``backward``, those that hooks return, and those that ``Function.backward`` returns.

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
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.tensor import HOST_KINDS, SimulatedTensor, make

_functorch: Final[Any] = torch._C._functorch


def is_batch(tensor: Any) -> bool:
    """Return whether a tensor belongs to an active transform, and is moved later."""
    return bool(
        _functorch.is_functorch_wrapped_tensor(tensor)
        or _functorch.is_legacy_batchedtensor(tensor)
    )


def _device_of(value: Any) -> torch.device | None:
    """Return the device of a plain tensor; None for any other value."""
    if isinstance(value, SimulatedTensor):
        return value.device
    if type(value) in HOST_KINDS and not is_batch(value):
        device: torch.device = value.device
        return device
    return None


def _device_inside(value: Any) -> torch.device | None:
    """Return the device of a tensor, also inside wrappers of ``torch.func``."""
    while isinstance(value, torch.Tensor) and _functorch.is_functorch_wrapped_tensor(
        value
    ):
        value = _functorch.get_unwrapped(value)
    return _device_of(value)


def _on_card(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a copy on a card of a tensor that C++ created on the host."""
    if tensor.requires_grad:
        return moved(tensor, device)
    return make(tensor.detach(), card_of(device.index))


def _on_device(
    grad: Any,
    wanted: torch.device | None,
    shape: torch.Size,
    what: str,
    *,
    is_batched: bool = False,
) -> Any:
    """Return a gradient on the required device; only a single number is copied.

    Args:
        grad: The gradient.
        wanted: The required device; None if any will do.
        shape: The required shape.
        what: The start of the error's text.
        is_batched: Whether the first dimension of the gradient is a batch of them.

    Raises:
        RuntimeError: The gradient is on another device and is not a single number (torch's
            message).
    """
    device = _device_inside(grad)
    if wanted is None or device is None or device == wanted:
        return grad
    if not _can_be_summed_to(grad.shape[1:] if is_batched else grad.shape, shape):
        return grad  # C++ raises its own error first
    if not shape:
        return moved(grad if is_batched else grad.sum(), wanted)
    raise RuntimeError(f"{what} - expected device {wanted} but got {device}")


def _can_be_summed_to(given: torch.Size, wanted: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(given, wanted) == given)
    except RuntimeError:
        return False


# -- gradients passed to backward -------------------------------------------------------

_make_grads: Final[Any] = torch.autograd._make_grads


def make_grads(
    outputs: Any,
    grads: Any,
    is_grads_batched: bool,  # noqa: FBT001  # torch's signature
) -> tuple[Any, ...]:
    """Run ``torch.autograd._make_grads``, which ``backward`` and ``grad`` call.

    Raises:
        RuntimeError: A gradient is not on the device of its output (torch's message).
    """
    made = _make_grads(outputs, grads, is_grads_batched)
    return tuple(
        _on_device(
            grad,
            _device_inside(out),
            out.shape,
            f"invalid gradient at index {index}",
            is_batched=is_grads_batched,
        )
        if isinstance(out, torch.Tensor)
        else grad
        for index, (out, grad) in enumerate(zip(outputs, made, strict=True))
    )


# -- gradients that hooks return --------------------------------------------------------


def check_hook(original: Any, result: Any, hook: Any) -> None:
    """Refuse a hook's result on another device type than the gradient passed to the hook.

    Raises:
        RuntimeError: With torch's message.
    """
    was, got = _device_of(original), _device_of(result)
    if was is None or got is None or was.type == got.type:
        return
    if "cuda" in {was.type, got.type}:  # C++ checks other devices itself
        raise RuntimeError(
            f"hook '{getattr(hook, '__name__', '<unknown>')}' has changed the type of "
            f"value (was {_type_of(original)} got {_type_of(result)})"
        )


def _type_of(tensor: torch.Tensor) -> str:
    """Return the C++ name of a tensor's type.

    Source: ``toString`` of ``aten/src/ATen/core/DeprecatedTypeProperties.cpp``.
    """
    name: Any = tensor.type()
    if not tensor.is_meta:
        return str(name)
    return f"Meta{name.rpartition('.')[2].removesuffix('Tensor')}Type"


_register_hook: Final[Any] = _HookMixin._register_hook


def register_hook(backward_hooks: Any, hook: Any) -> Any:
    """Register a hook for ``register_hook`` and ``register_prehook`` of a graph's node.

    In both, the first argument of the hook is the gradients that it may replace.
    """

    def held(*grads: Any) -> Any:
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
    """Return a node's gradients; if one is on a card, move all with dimensions there.

    C++ creates some gradients on the host. A node written in Python may have gradients on
    several devices.
    """
    node: Any = torch._C._current_autograd_node()  # no public API
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
            and _device_of(each) != card.device
            and each.is_cpu
            and each.dim()
            else each
            for each in group
        )
        for group in grads
    )


# -- gradients of a user's Function -------------------------------------------------------

#: ``Function.apply``, a class method; up to torch 2.13 it is written in Python.
_apply: Final[Any] = vars(torch.autograd.Function)["apply"]
_apply_users: Final[Any] = of_user(BackwardCFunction.apply)


def apply(cls: Any, *args: Any, **options: Any) -> Any:
    """Run ``Function.apply``, and record the devices of its tensors for backward."""
    results = _apply.__get__(None, cls)(*args, **options)
    outputs = results if isinstance(results, tuple) else (results,)
    for each in outputs:
        node = each.grad_fn if isinstance(each, torch.Tensor) else None
        if getattr(node, "_forward_cls", None) is cls:
            ctx: Any = node
            ctx._gpumem_devices = list(map(_note, args)), list(map(_device_of, outputs))
            break
    return results


def _note(value: Any) -> tuple[torch.device | None, torch.Size] | None:
    """Return an argument's device and shape; None if it is not a tensor."""
    return (_device_of(value), value.shape) if isinstance(value, torch.Tensor) else None


def apply_backward(self: Any, *grads: Any) -> Any:
    """Run ``BackwardCFunction.apply`` with gradients on the devices of their tensors.

    Raises:
        RuntimeError: A returned gradient is on another device (torch's message).
    """
    devices = getattr(self, "_gpumem_devices", None)
    if devices is None:
        return _apply_users(self, *grads)
    inputs, outputs = devices
    grads = tuple(
        _on_card(grad, device)
        if device is not None
        and device.type == "cuda"
        and (there := _device_of(grad)) is not None
        and there.type == "cpu"
        else grad
        for grad, device in zip(grads, outputs, strict=True)
    )
    results = _apply_users(self, *grads)
    is_alone = not isinstance(results, tuple)
    made, index = [], 0
    for grad, note in zip((results,) if is_alone else results, inputs, strict=False):
        if note is None:
            made.append(grad)
            continue
        what = f"Function {self.name()} returned an invalid gradient at index {index}"
        device, shape = note
        made.append(_on_device(grad, device, shape, what))
        index += 1
    made += () if is_alone else results[len(made) :]
    return made[0] if is_alone and made else tuple(made)


# -- tangents ------------------------------------------------------------------------------

_unpack_dual: Final[Any] = torch.autograd.forward_ad.unpack_dual


def unpack_dual(tensor: Any, *, level: Any = None) -> Any:
    """Run ``unpack_dual``; move a tangent of zeros that C++ made to its tensor's device."""
    pair = _unpack_dual(tensor, level=level)
    primal, tangent = pair
    if (
        isinstance(tangent, torch.Tensor)
        and isinstance(primal, torch.Tensor)
        and primal.is_cuda
        and not tangent.is_cuda
        and not tangent.is_meta
    ):
        return type(pair)(primal, moved(tangent, primal.device))
    return pair


# -- tensors that were modified after they were saved --------------------------------------

_run_engine: Final[Any] = torch.autograd.graph._engine_run_backward
#: The start of the error for a saved tensor that was modified. Source:
#: ``SavedVariable::unpack`` of ``torch/csrc/autograd/saved_variable.cpp``.
_MODIFIED: Final = (
    "one of the variables needed for gradient computation has been modified by an "
    "inplace operation: [torch."
)


def run_engine(outputs: Any, *args: Any, **options: Any) -> Any:
    """Run the backward pass; errors name the types of tensors as on a real card.

    Raises:
        RuntimeError: A tensor was modified after it was saved (torch's message).
    """
    streams = current_machine().streams
    if streams.are_used:
        streams.note_leaves(
            [
                each.grad_fn if isinstance(each, torch.Tensor) else each.node
                for each in outputs
            ]
        )
    try:
        return _run_engine(outputs, *args, **options)
    except RuntimeError as error:
        text = str(error)
        if text.startswith(_MODIFIED) and _is_saved_on_card(outputs, text):
            named = text.replace(_MODIFIED, f"{_MODIFIED}cuda.", 1)
            error.args = (named, *error.args[1:])
        raise


def _is_saved_on_card(outputs: Any, text: str) -> bool:
    """Return whether the node that raises an error for a saved tensor is on a card.

    A node is on the device of the node that it was reached from, unless that node is a
    ``Function``, whose tensors' devices are recorded, or a copy between devices.
    """
    reached = [
        (each.grad_fn, each.is_cuda) if isinstance(each, torch.Tensor) else each
        for each in outputs
    ]
    seen = set()
    while reached:
        node, is_cards = reached.pop()
        if node is None or (node, is_cards) in seen:
            continue
        seen.add((node, is_cards))
        if _raises(node, text):
            return bool(is_cards)
        reached += _following(node, is_cards=is_cards)
    return False


def _following(node: Any, *, is_cards: bool) -> list[tuple[Any, bool]]:
    """Return the nodes that a node leads to, and whether each is on a card."""
    nodes = [each for each, _index in node.next_functions]
    notes, _outputs = getattr(node, "_gpumem_devices", ((), ()))
    devices = [note[0] for note in notes if note is not None]
    if len(devices) == len(nodes):
        return [
            (each, device is not None and device.type == "cuda")
            for each, device in zip(nodes, devices, strict=True)
        ]
    found = [(each, is_cards) for each in nodes]
    if node.name().endswith("::CopyBackwards"):
        source = nodes[-1]  # the other one is the tensor that is written to
        found[-1] = source, _starts_on_card(source)
    return found


def _starts_on_card(node: Any) -> bool:
    """Return whether a node is on a card, judged by the first leaf that it leads to."""
    while node is not None:
        leaf = getattr(node, "variable", None)  # only AccumulateGrad has it
        if leaf is not None:
            return bool(leaf.is_cuda)
        _inputs, outputs = getattr(node, "_gpumem_devices", ((), ()))
        if outputs:
            return outputs[0] is not None and outputs[0].type == "cuda"
        node = next((each for each, _index in node.next_functions if each), None)
    return False


def _raises(node: Any, text: str) -> bool:
    """Return whether reading a node's saved tensors raises an error with this text."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    for name in (*names, "saved_tensors"):
        try:
            getattr(node, name, None)
        except RuntimeError as error:  # noqa: PERF203  # each attribute may raise
            if str(error) == text:
                return True
    return False


# -- saved tensors that are unpacked in backward ------------------------------------------

_push_hooks: Final[Any] = torch._C._autograd._push_saved_tensors_default_hooks


def push_hooks(pack: Any, unpack: Any) -> None:
    """Push the hooks of ``saved_tensors_hooks``; the second one runs in backward."""
    _push_hooks(pack, of_user(unpack))


#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (torch.autograd, "_make_grads", make_grads),
    (torch.autograd, "_engine_run_backward", run_engine),
    (torch.autograd.graph, "_engine_run_backward", run_engine),
    (torch._C._autograd, "_push_saved_tensors_default_hooks", push_hooks),
    (_HookMixin, "_register_hook", staticmethod(register_hook)),
    (torch.autograd.forward_ad, "unpack_dual", unpack_dual),
    (torch.autograd.Function, "apply", classmethod(apply)),
    (BackwardCFunction, "apply", apply_backward),
)
