"""How an operator runs on the simulated device: values by the CPU, bytes by the card.

Each operator gets a handler, made once from its schema:

* *plain*: run on the CPU tensors, wrap what comes out. A result whose storage is
  already on the card is a view; any other is charged.
* *mutating*: likewise, but a result that is an argument is that argument again, and
  an argument that changed its shape or storage is refreshed.
* a special handler from ``special.py`` for what crosses devices.

Results of an operator that draws random numbers, or changes something, be it its
arguments or more than its schema says, are charged before it runs: an OOM comes before
any effect.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._library.custom_ops import OPDEFS

from pytest_gpumem.devices.simulated.accumulation import with_accumulation
from pytest_gpumem.devices.simulated.determinism import check_cublas, with_alert
from pytest_gpumem.devices.simulated.foresight import (
    NOTHING,
    foresee,
    foresee_growth,
    may_allocate,
    tensors_of,
)
from pytest_gpumem.devices.simulated.memory import hold, hold_workspace
from pytest_gpumem.devices.simulated.operands import (
    Operands,
    check_devices,
    in_backward,
)
from pytest_gpumem.devices.simulated.rng import drawing
from pytest_gpumem.devices.simulated.scratch import with_scratch
from pytest_gpumem.devices.simulated.tensor import (
    HANDLERS,
    make,
    refresh,
)
from pytest_gpumem.devices.simulated.values import computing, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.tensor import Handler

#: Operators whose kernels use a cuBLAS handle, by packet name.
#: Source: callers of ``getCurrentCUDABlasHandle`` in ``aten/src/ATen/native/cuda``.
USES_CUBLAS: Final = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "vdot", "addr"}
)

#: Operators that change running statistics though their schemas say nothing of it.
#: Source: ``aten/src/ATen/native/native_functions.yaml``, torch 2.13.
HAS_EFFECTS: Final = frozenset({"native_batch_norm", "cudnn_batch_norm", "batch_norm"})

SPECIAL: Final[dict[str, Handler]] = {}

#: Operators that are composed anew for the simulated cards; see ``composites.py``.
COMPOSED: Final[dict[Any, Callable[..., Any]]] = {}


#: Operators that have a kernel of their own on a card, and are composed where a backend
#: has none. For C++ this build has none for cards.
#: Source: ``CUDA`` beside ``CompositeImplicitAutograd`` in ``native_functions.yaml``.
OWN_KERNELS: Final = frozenset({"_fused_rms_norm", "mish_backward", "silu_backward"})


def _wrap(value: Any, card: SimulatedCard) -> Any:
    if isinstance(value, torch.Tensor):
        return make(value, card)
    if isinstance(value, (tuple, list)):
        return type(value)([_wrap(item, card) for item in value])
    return value


def _target(kwargs: dict[str, Any], operands: Operands) -> SimulatedCard | None:
    """Return the card that results go to; None where ``device=`` says the host."""
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


def is_own_device(kwargs: dict[str, Any], card: SimulatedCard) -> bool:
    """Tell whether ``device=`` is what C++ takes for the tensor's own device.

    Operators that torch composes in C++ hand on ``tensor.options()``, in backward and
    out of it. Such options name a layout; a device that Python code asks for comes
    without one.
    """
    return kwargs["device"].type == card.value_device and (
        kwargs.get("layout") is not None or in_backward()
    )


def _blas_handle() -> object:
    """Return which cuBLAS handle the thread has.

    A handle belongs to a host thread, and on a real card backward runs in one of its
    own.
    """
    return "autograd" if in_backward() else threading.get_ident()


def _plain(func: Any) -> Handler:
    name = func.overloadpacket.__name__
    uses_cublas = name in USES_CUBLAS
    draw = drawing(func)
    has_effects = name in HAS_EFFECTS or draw is not None
    compute = computing(func)

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = Operands()
        unwrap = operands.unwrap
        values = [unwrap(arg) for arg in args]
        if kwargs:
            kwargs = {name: unwrap(value) for name, value in kwargs.items()}
        if operands.host is not None or operands.strays is not None:
            check_devices(func, args, kwargs, operands)
        card = _any_card(operands.card)
        target = _target(kwargs, operands) if "device" in kwargs else card
        if uses_cublas:
            if torch.are_deterministic_algorithms_enabled():
                check_cublas()
            hold_workspace(card, _blas_handle())
        held = foresee(func, values, kwargs, target) if has_effects else ()
        out = run(func, values, kwargs, card, draw=draw, compute=compute)
        if target is None:
            return out
        for result, memory in zip(tensors_of(out), held, strict=False):
            hold(result.untyped_storage(), memory)
        if isinstance(out, torch.Tensor):
            return make(out, target)
        return _wrap(out, target)

    return handler


def _any_card(card: SimulatedCard | None) -> SimulatedCard:
    assert card is not None, "unreachable: dispatch needs a simulated operand"  # noqa: S101  # states why
    return card


def _mutating(func: Any) -> Handler:
    draw = drawing(func)
    allocates = may_allocate(func)

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = Operands()
        values = [operands.unwrap(arg) for arg in args]
        inner = {name: operands.unwrap(value) for name, value in kwargs.items()}
        if operands.host is not None or operands.strays is not None:
            check_devices(func, args, kwargs, operands)
        card = _any_card(operands.card)
        shapes = [
            (outer, outer._value.shape, outer._value.untyped_storage().nbytes())
            for outer in operands.outer.values()
        ]
        growing, made = (
            foresee_growth(func, values, inner, card) if allocates else NOTHING
        )
        out = run(func, values, inner, card, draw=draw)
        for value, memory in growing:
            hold(value.untyped_storage(), memory)
        if made:
            own = {id(each) for each in operands.outer_values()}
            results = [each for each in tensors_of(out) if id(each) not in own]
            for result, memory in zip(results, made, strict=False):
                hold(result.untyped_storage(), memory)
        for outer, shape, nbytes in shapes:
            value = outer._value
            if (
                value.shape != shape
                or value.untyped_storage().nbytes() != nbytes
                or value.stride() != outer.stride()
                or value.storage_offset() != outer.storage_offset()
            ):
                refresh(outer)
        return _same(out, operands, card)

    return handler


def _same(value: Any, operands: Operands, card: SimulatedCard) -> Any:
    """Wrap results, giving back the very argument where one was returned."""
    if isinstance(value, torch.Tensor):
        outer = operands.outer.get(id(value))
        if outer is not None:
            return outer
        return make(value, card) if value.is_cpu or value.is_meta else value
    if isinstance(value, (tuple, list)):
        return type(value)([_same(item, operands, card) for item in value])
    return value


def _python_kernel(func: Any) -> Callable[..., Any] | None:
    """Return what ``torch.library.custom_op`` was given for tensors of a card."""
    definition = OPDEFS.get(func._schema.name)  # the schema has no public name
    kernels = getattr(definition, "_backend_fns", {})
    found: Callable[..., Any] | None = kernels.get("cuda", kernels.get(None))
    return found


def _composed(func: Any) -> Handler | None:
    """Return how to run an operator that consists of others; None for any else.

    Autograd takes these apart before they come here. In ``torch.inference_mode`` it
    does not, but on a card their parts are what runs and asks for memory.
    """
    kernel = COMPOSED.get(func) or _python_kernel(func)
    if kernel is None:
        if func.overloadpacket.__name__ in OWN_KERNELS:
            return None
        if not torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            return None
        kernel = func.decompose
    chosen = kernel

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        return chosen(*args, **kwargs)

    return handler


def handler_for(func: Any) -> Handler:
    """Return how to run an operator, from its name and schema."""
    special = SPECIAL.get(func.overloadpacket.__name__)
    if special is not None and func.namespace == "aten":
        return special
    composed = _composed(func)
    if composed is not None:
        return composed
    if func._schema.is_mutable:  # the schema has no public name
        return with_alert(func, _mutating(func))
    handler = with_scratch(func.overloadpacket.__name__, _plain(func))
    return with_alert(func, with_accumulation(func, handler))


HANDLERS.make = handler_for
