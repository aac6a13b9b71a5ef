"""Runs operators on the simulated device: the CPU computes values, the card counts bytes.

Each overload has a handler, which is made once from its schema and its record in
``operators/``:

* *plain*: runs the operator on the CPU tensors and wraps the results. A result whose
  storage is already on the card is a view; for any other result, bytes are allocated.
* *mutating*: as *plain*, but if a result is an argument, that argument is returned, and
  an argument whose shape or storage has changed is refreshed.
* *composed*: runs only a function that calls other operators.

If an operator draws random numbers or has side effects, on its arguments or beyond its
schema, its memory is allocated before it runs, so that an OOM is raised before any
effect. For any other operator it is allocated after the values are computed; the user
cannot observe the difference.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._library.custom_ops import OPDEFS

from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.determinism import check_cublas, with_alert
from pytest_gpumem.devices.simulated.distributed import COLLECTIVES
from pytest_gpumem.devices.simulated.early_requests import (
    foreseeing,
    may_allocate,
)
from pytest_gpumem.devices.simulated.kernel_types import check_shapes, with_types
from pytest_gpumem.devices.simulated.layouts import TWO_LAYOUTS
from pytest_gpumem.devices.simulated.memory import Memory, hold, hold_workspace
from pytest_gpumem.devices.simulated.operands import Operands, is_own_device
from pytest_gpumem.devices.simulated.operators import find
from pytest_gpumem.devices.simulated.operators.checks import (
    are_formulas_active,
    checking,
)
from pytest_gpumem.devices.simulated.operators.out_checks import guarded
from pytest_gpumem.devices.simulated.operators.requests import (
    Call,
    Results,
    ask,
    flat,
    workspaces,
)
from pytest_gpumem.devices.simulated.refusals import refuse_layout
from pytest_gpumem.devices.simulated.rng import drawing
from pytest_gpumem.devices.simulated.tensor import (
    HANDLERS,
    SimulatedTensor,
    make,
    refresh,
)
from pytest_gpumem.devices.simulated.values import computing, is_view, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.operators.registry import Operator
    from pytest_gpumem.devices.simulated.tensor import Handler

_NEEDS_OPERAND: Final = "unreachable: dispatch needs a simulated operand"


def _wrap(value: Any, card: SimulatedCard) -> Any:
    if isinstance(value, torch.Tensor):
        # An operator in Python that got a ``device`` argument creates its result there.
        return value if isinstance(value, SimulatedTensor) else make(value, card)
    if isinstance(value, (tuple, list)):
        return type(value)([_wrap(item, card) for item in value])
    return value


def _target(kwargs: dict[str, Any], operands: Operands) -> SimulatedCard | None:
    """Return the card of the results; None if ``device=`` names the host."""
    card = operands.card
    device = kwargs.get("device")
    if device is None or card is None:
        return card
    is_own = is_own_device(kwargs, card)
    kwargs["device"] = torch.device(card.value_device)
    if is_own:
        return card
    if device.type == "cuda":
        return card.machine.card(device.index)
    kwargs["device"] = device
    return None


def _plain(func: Any, operator: Operator) -> Handler:
    uses_cublas = operator.uses_cublas
    draw = drawing(func, operator)
    has_effects = operator.has_effects or draw is not None
    asks = operator.requests is not None
    takes_helpers = operator.helper is not None
    compute = computing(func, operator)
    foresee = foreseeing(func, operator, draw=draw, compute=compute)
    check_devices = checking(func, operator)

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = Operands()
        unwrap = operands.unwrap
        values = [unwrap(arg) for arg in args]
        given = kwargs
        if kwargs:
            kwargs = {name: unwrap(value) for name, value in kwargs.items()}
        is_mixed = operands.host is not None or operands.strays is not None
        if is_mixed and not _is_for_card(check_devices, args, given, operands):
            return _run_on_meta(func, args, given)
        card = operands.card
        assert card is not None, _NEEDS_OPERAND  # noqa: S101  # states why
        target = _target(kwargs, operands) if "device" in kwargs else card
        if uses_cublas and torch.are_deterministic_algorithms_enabled():
            check_cublas()
        helpers = operands.host is not None and _helpers(
            values, card, takes_helpers=takes_helpers
        )
        held: Any = ()
        if has_effects and target is not None and target.value_device != "meta":
            held = foresee(values, kwargs, target)[1]
        out = run(func, values, kwargs, card, draw=draw, compute=compute)
        if target is None:
            return out
        frees = uses_cublas and not card.keeps_workspaces
        if (asks or frees) and not held:
            held = _charge(func, operator, values, kwargs, out, target)
        if held:
            _attach(held, out)
        made = (
            make(out, target) if isinstance(out, torch.Tensor) else _wrap(out, target)
        )
        if uses_cublas and not frees:
            hold_workspace(card)
        del helpers
        return made

    return _viewing(func, handler) if _is_view_of_one(func, operator) else handler


def _is_for_card(
    check_devices: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operands: Operands,
) -> bool:
    """Return whether a card runs a call; with an operand on ``meta``, ``meta`` does.

    A card that keeps no values has its values on ``meta``, where C++ creates helper
    tensors.

    Raises:
        RuntimeError: The devices of the operands do not fit (torch's message).
    """
    card = operands.card
    if operands.meta and card is not None and card.value_device != "meta":
        return False
    check_devices(args, kwargs, operands)
    return True


def _run_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator's code for ``meta``, which makes results on either device.

    Source: ``DispatchKeySet.h``, in which ``Meta`` comes before ``CUDA``;
    ``torch/_meta_registrations.py`` and ``torch/_refs``, which check the devices.
    """
    try:
        return func.redispatch(_META, *args, **kwargs)
    except RuntimeError as error:
        # C++ sees a card's tensors on the host.
        places = {
            each.device
            for each in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(each, torch.Tensor)
        }
        cards = [each for each in places if each.type == "cuda"]
        if len(cards) == 1 and torch.device("cpu") not in places:
            error.args = (_HOST.sub(str(cards[0]), str(error)), *error.args[1:])
        raise


#: The host, in the text of an error about devices.
_HOST: Final = re.compile(r"(?<=device )cpu\b|(?<=on )cpu\b")
_META: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


def _viewing(func: Any, general: Handler) -> Handler:
    """Return a faster handler for views of one tensor; other calls use ``general``.

    A view requests no memory and computes nothing. Two in five operators of a
    transformer's forward are views.
    """

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source = args[0] if args else None
        if kwargs or TWO_LAYOUTS or type(source) is not SimulatedTensor:
            return general(args, kwargs)
        try:
            value = func(source._gpumem_value, *args[1:])
        except RuntimeError:
            return general(args, kwargs)  # the general handler raises the error
        return make(value, source._gpumem_card)

    return handler


def _is_view_of_one(func: Any, operator: Operator) -> bool:
    """Return whether an operator only returns one view of its only tensor."""
    schema = func._schema
    if not schema.arguments or len(schema.returns) != 1:
        return False
    first, *others = schema.arguments
    kinds = [str(each.type) for each in (*others, *schema.returns)]
    return (
        is_view(schema.returns[0])
        and str(first.type) == "Tensor"
        and sum("Tensor" in kind for kind in kinds) == 1
        and kinds[-1] == "Tensor"
        and not _is_composed(func)
        and operator.compute is None
        and operator.requests is None
        and operator.draw is None
        and not operator.has_effects
        and not operator.uses_cublas
    )


def _helpers(
    values: list[Any], card: SimulatedCard, *, takes_helpers: bool
) -> list[Memory]:
    """Request memory for the helpers of a gradient or tangent that C++ creates on a card.

    Here C++ has created these tensors on the host.
    """
    if not (in_backward() or (takes_helpers and are_formulas_active())):
        return []
    return [
        Memory(card, each.nbytes)
        for each in flat(values)
        if each is not None
        and each.dim() > 0
        and not hasattr(each.untyped_storage(), "_gpumem")
    ]


def _charge(  # noqa: PLR0917  # the parts of a call and its results
    func: Any, operator: Operator, values: Any, kwargs: Any, out: Any, card: Any
) -> list[Memory | None]:
    """Make the requests of an operator's rule after its results are computed."""
    rule: Any = operator.requests
    results = flat(out)
    call = Call(func, values, kwargs, results, card)
    steps = () if rule is None else rule(call)
    if operator.uses_cublas and not card.keeps_workspaces:
        steps = (*steps, Results(), *workspaces(call))
    if steps == ():
        return []  # there are only results; wrapping them requests their memory
    return ask(steps, _new_bytes(results), card)


def _new_bytes(results: list[torch.Tensor | None]) -> list[int]:
    """Return the bytes that each result requests; a view requests none."""
    known: set[int] = set()
    sizes = []
    for result in results:
        nbytes = 0
        if result is not None:
            if result.layout is not torch.strided:
                refuse_layout(result.layout)
            storage = result.untyped_storage()
            if not hasattr(storage, "_gpumem") and storage._cdata not in known:
                known.add(storage._cdata)
                nbytes = storage.nbytes()
        sizes.append(nbytes)
    return sizes


def _attach(held: list[Memory | None], out: Any) -> None:
    """Attach the memory that was allocated for results to their storages."""
    for result, memory in zip(flat(out), held, strict=False):
        if result is not None and memory is not None:
            hold(result.untyped_storage(), memory)


def _mutating(func: Any, operator: Operator) -> Handler:
    uses_cublas = operator.uses_cublas
    draw = drawing(func, operator)
    allocates = may_allocate(func, operator)
    compute = computing(func, operator)
    foresee = foreseeing(func, operator, draw=draw, compute=compute)
    check_devices = checking(func, operator)

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = Operands()
        values = [operands.unwrap(arg) for arg in args]
        inner = {name: operands.unwrap(value) for name, value in kwargs.items()}
        is_mixed = operands.host is not None or operands.strays is not None
        if is_mixed and not _is_for_card(check_devices, args, kwargs, operands):
            return _run_on_meta(func, args, kwargs)
        card = operands.card
        assert card is not None, _NEEDS_OPERAND  # noqa: S101  # states why
        if uses_cublas and torch.are_deterministic_algorithms_enabled():
            check_cublas()
        shapes = [
            (
                outer,
                outer._gpumem_value.shape,
                outer._gpumem_value.untyped_storage().nbytes(),
            )
            for outer in operands.outer.values()
        ]
        growing: Any = ()
        made: Any = ()
        if allocates:
            growing, made = foresee(values, inner, card)
        if uses_cublas:
            _hold_workspace(func, values, inner, card)
        out = run(func, values, inner, card, draw=draw, compute=compute)
        for value, memory in growing:
            hold(value.untyped_storage(), memory)
        if made:
            _attach(made, out)
        _refresh_changed(shapes)
        return _same(out, operands, card)

    return handler


def _refresh_changed(shapes: list[tuple[SimulatedTensor, torch.Size, int]]) -> None:
    """Update the tensors whose values have other sizes or storages than before a call."""
    for outer, shape, nbytes in shapes:
        value = outer._gpumem_value
        if (
            value.shape != shape
            or value.untyped_storage().nbytes() != nbytes
            or value.stride() != outer.stride()
            or value.storage_offset() != outer.storage_offset()
        ):
            refresh(outer)


def _hold_workspace(
    func: Any, values: list[Any], kwargs: dict[str, Any], card: SimulatedCard
) -> None:
    """Request the workspace of a product that is written to an argument."""
    if card.keeps_workspaces:
        hold_workspace(card)
        return
    written = [kwargs.get("out", values[0])]
    for each in workspaces(Call(func, values, kwargs, written, card)):
        each.ask(card)


def _same(value: Any, operands: Operands, card: SimulatedCard) -> Any:
    """Wrap results; if the operator returned an argument, return that same object."""
    if isinstance(value, torch.Tensor):
        outer = operands.outer.get(id(value))
        if outer is not None:
            return outer
        return make(value, card) if value.is_cpu or value.is_meta else value
    if isinstance(value, (tuple, list)):
        return type(value)([_same(item, operands, card) for item in value])
    return value


def _python_kernel(func: Any) -> Callable[..., Any] | None:
    """Return the kernel for CUDA that was given to ``torch.library.custom_op``."""
    definition = OPDEFS.get(func._schema.name)  # no public API
    kernels = getattr(definition, "_backend_fns", {})
    found: Callable[..., Any] | None = kernels.get("cuda", kernels.get(None))
    return found


def _is_composed(func: Any) -> bool:
    """Return whether C++ composes an operator of other operators, above autograd."""
    composed: bool = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    return composed


def _composed(func: Any, operator: Operator) -> Handler | None:
    """Return the handler of an operator that is composed of others; None if it is not.

    Autograd decomposes such operators before they are dispatched here, but not in
    ``torch.inference_mode``. On a card, the operators of which they are composed run and
    request memory in that mode as well.
    """
    kernel = operator.composed and operator.composed(func)
    kernel = kernel or (operator.decomposed and operator.decomposed(func))
    kernel = guarded(func, kernel or _python_kernel(func))
    if kernel is None:
        if operator.has_cuda_kernel:
            return None
        if not _is_composed(func):
            return None
        kernel = func.decompose
    chosen = kernel

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return chosen(*args, **kwargs)

    return handler


def handler_for(func: Any) -> Handler:
    """Return the handler of an operator, from its record and its schema."""
    operator = find(func)
    fills_out = any(each.is_out for each in func._schema.arguments)
    if operator.handler is not None and not fills_out:
        return operator.handler
    composed = _composed(func, operator)
    if composed is not None:
        return composed
    maker = _mutating if func._schema.is_mutable else _plain
    handler = maker(func, operator)
    collective = COLLECTIVES.get(func.namespace)
    if collective is not None:
        return collective(func, handler)
    if operator.lacks is not None:
        handler = with_types(operator.lacks, handler, _checking_first(func, operator))
    if operator.around is not None:
        handler = operator.around(func, handler)
    return with_alert(func, operator, handler)


def _checking_first(func: Any, operator: Operator) -> Any:
    """Return a check of a call's devices and a product's shapes, made before its dtypes.

    Source: ``wrapper_kernel_sig`` of ``torchgen/dest/register_dispatch_key.py``;
    ``TORCH_META_FUNC`` of ``LinearAlgebra.cpp``, which runs before the kernel.
    """
    check_devices = checking(func, operator)
    out_of_place = func if not func._schema.is_mutable else None

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        operands = Operands()
        for each in (*args, *kwargs.values()):
            operands.unwrap(each)
        if operands.host is not None or operands.strays is not None:
            _is_for_card(check_devices, args, kwargs, operands)
        if operator.uses_cublas and out_of_place is not None:
            check_shapes(out_of_place, args)

    return check


def _checking_context(func: Any, handler: Handler) -> Handler:
    """Return a handler that refuses kernels in a forked child on its parent's cards.

    Views stay possible, because no kernel runs for them.
    """
    if _is_view_of_one(func, find(func)):
        return handler

    def checked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for each in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(each, SimulatedTensor):
                each._gpumem_card.check_context()  # private to this package
        return handler(args, kwargs)

    return checked


HANDLERS.make = handler_for
if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=lambda: HANDLERS.wrap(_checking_context))
