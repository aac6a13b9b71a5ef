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
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._library.custom_ops import OPDEFS

from pytest_gpumem.devices.simulated.accumulation import with_accumulation
from pytest_gpumem.devices.simulated.checks import INDEXING, check_indexing
from pytest_gpumem.devices.simulated.memory import Memory, hold, hold_workspace
from pytest_gpumem.devices.simulated.scratch import with_scratch
from pytest_gpumem.devices.simulated.tensor import (
    HANDLERS,
    SimulatedTensor,
    make,
    refresh,
)
from pytest_gpumem.devices.simulated.values import computing, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.tensor import Handler

#: Operators that take CPU tensors beside CUDA ones, by packet name.
#: Source: torch's own operators accept host indices, lengths and step counters.
TAKES_HOST_TENSORS: Final = INDEXING | frozenset(
    {
        "_pack_padded_sequence",
        "_ctc_loss",
        "_fused_adam_",
        "_fused_adamw_",
        "_fused_sgd_",
        "_fused_adagrad_",
        "_amp_foreach_non_finite_check_and_unscale_",
        "_amp_update_scale_",
        "index_fill_",  # how torch 2.15 assigns a number at host indices
        "_foreach_add_",
        "_foreach_copy_",
        "mkldnn_rnn_layer",  # its biases, where a layer has none
    }
)

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


class _Operands:
    """Unwraps the arguments of one call and notes which card they live on."""

    __slots__ = ("card", "host", "outer", "strays")

    def __init__(self) -> None:
        self.card: SimulatedCard | None = None
        self.host: torch.Tensor | None = None
        self.outer: dict[int, SimulatedTensor] = {}
        self.strays: SimulatedCard | None = None

    def outer_values(self) -> list[torch.Tensor]:
        """Return the tensors with the values of the operands on the card."""
        return [outer._value for outer in self.outer.values()]

    def unwrap(self, value: Any) -> Any:
        kind = type(value)
        if kind is SimulatedTensor:
            card = value._card
            if self.card is None:
                self.card = card
            elif card is not self.card:
                self.strays = card
            self.outer[id(value._value)] = value
            return value._value
        if kind is list or kind is tuple:
            return kind([self.unwrap(item) for item in value])
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            self.host = value
        return value


def _mismatch(func: Any, args: Any, operands: _Operands) -> RuntimeError:
    """Return torch's error for operands on more than one device.

    Source: ``aten/src/ATen/TensorIterator.cpp`` for element-wise operators,
    ``c10/core/impl/DeviceGuardImplInterface`` checks of generated kernels
    (``common_device_check_failure``) for the others.
    """
    name = func._schema.name.partition("::")[2]  # the schema has no public name
    if torch.Tag.pointwise in func.tags:
        first, second = _two_devices(operands)
        return RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, {first} and {second}!"
        )
    places = [
        (argument.name, str(each.device))
        for argument, value in zip(
            func._schema.arguments, args, strict=False
        )  # see above
        for each in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(each, torch.Tensor) and each.dim() > 0
    ]
    first = places[0][1] if places else "cuda:0"
    argument, other = next(
        (place for place in places if place[1] != first), ("tensors", "cpu")
    )
    return RuntimeError(
        f"Expected all tensors to be on the same device, but got {argument} is on "
        f"{other}, different from other tensors on {first} (when checking argument in "
        f"method wrapper_CUDA_{name})"
    )


def _two_devices(operands: _Operands) -> tuple[str, str]:
    first = f"cuda:{operands.card.index}" if operands.card is not None else "cpu"
    if operands.strays is not None:
        return first, f"cuda:{operands.strays.index}"
    return first, str(operands.host.device) if operands.host is not None else "cpu"


def _check_devices(func: Any, args: Any, operands: _Operands) -> None:
    if func.overloadpacket.__name__ in INDEXING and not in_backward():
        check_indexing(args[0], args[1], args[2] if len(args) > 2 else None)  # noqa: PLR2004  # the values
        return
    if operands.strays is not None:
        raise _mismatch(func, args, operands)
    if (
        operands.host is not None
        and operands.card is not None
        and func.overloadpacket.__name__ not in TAKES_HOST_TENSORS
        and not in_backward()
        # Where no values are kept, operators that torch composes in C++ make their
        # helpers on what it takes for the tensors' device.
        and not (operands.host.is_meta and operands.card.value_device == "meta")
    ):
        raise _mismatch(func, args, operands)


def _wrap(value: Any, card: SimulatedCard) -> Any:
    if isinstance(value, torch.Tensor):
        return make(value, card)
    if isinstance(value, (tuple, list)):
        return type(value)([_wrap(item, card) for item in value])
    return value


def _target(kwargs: dict[str, Any], operands: _Operands) -> SimulatedCard | None:
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
        machine = card.machine
        index = machine.current_index if device.index is None else device.index
        return machine.cards[index]
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


def in_backward() -> bool:
    """Tell whether autograd is at work in this thread.

    There, torch's own C++ makes helpers on what it takes for the tensors' device, the
    CPU: such an operand or target is no mistake, and no wish, of the user's.
    """
    return bool(torch._C._current_graph_task_id() != -1)  # no public way to ask


def _blas_handle() -> object:
    """Return which cuBLAS handle the thread has.

    A handle belongs to a host thread, and on a real card backward runs in one of its
    own.
    """
    return "autograd" if in_backward() else threading.get_ident()


def _plain(func: Any) -> Handler:
    name = func.overloadpacket.__name__
    uses_cublas = name in USES_CUBLAS
    has_effects = name in HAS_EFFECTS or torch.Tag.nondeterministic_seeded in func.tags
    draws = torch.Tag.nondeterministic_seeded in func.tags
    compute = computing(func)

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = _Operands()
        unwrap = operands.unwrap
        values = [unwrap(arg) for arg in args]
        if kwargs:
            kwargs = {name: unwrap(value) for name, value in kwargs.items()}
        if operands.host is not None or operands.strays is not None:
            _check_devices(func, args, operands)
        card = _any_card(operands.card)
        target = _target(kwargs, operands) if "device" in kwargs else card
        if uses_cublas:
            hold_workspace(card, _blas_handle())
        held = _foresee(func, values, kwargs, target) if has_effects else ()
        out = run(func, values, kwargs, card, draws=draws, compute=compute)
        if target is None:
            return out
        for result, memory in zip(_tensors(out), held, strict=False):
            hold(result.untyped_storage(), memory)
        if isinstance(out, torch.Tensor):
            return make(out, target)
        return _wrap(out, target)

    return handler


def _foresee(
    func: Any, values: list[Any], kwargs: dict[str, Any], card: SimulatedCard | None
) -> list[Memory]:
    """Take the bytes of an operator's results before it runs.

    An operator that draws numbers, or changes what its schema does not say, must not
    have done so when there is no room. Its results are foreseen on meta tensors; one
    that cannot run there is charged afterwards.

    Raises:
        torch.OutOfMemoryError: There is no room.
    """
    __tracebackhide__ = True
    if card is None or card.value_device == "meta":
        return []  # a run on meta tensors has no effects
    options = {
        name: _META if isinstance(value, torch.device) else value
        for name, value in kwargs.items()
        if name != "generator"
    }
    try:
        made = func(*(_shadow(value) for value in values), **options)
    except (RuntimeError, TypeError):
        return []
    sizes = [result.untyped_storage().nbytes() for result in _tensors(made)]
    return [Memory(card, nbytes) for nbytes in sizes]


_META: Final = torch.device("meta")


def _shadow(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=_META
        )
    if isinstance(value, (list, tuple)):
        return type(value)([_shadow(item) for item in value])
    return value


def _tensors(out: Any) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    results = out if isinstance(out, (tuple, list)) else ()
    return [each for each in results if isinstance(each, torch.Tensor)]


def _any_card(card: SimulatedCard | None) -> SimulatedCard:
    assert card is not None, "unreachable: dispatch needs a simulated operand"  # noqa: S101  # states why
    return card


def _may_allocate(func: Any) -> bool:
    """Tell whether an operator that changes its arguments can also ask for memory.

    It does where it gives an ``out=`` another size, or returns something new.
    """
    schema = func._schema  # it has no public name
    return (
        "resize" in func.overloadpacket.__name__
        or any(each.is_out for each in schema.arguments)
        or any(each.alias_info is None for each in schema.returns)
    )


_Growth = tuple[list[tuple[torch.Tensor, Memory]], list[Memory]]
_NOTHING: Final[_Growth] = ([], [])
#: Tensors with their shadows on meta, by the tensors' ids.
_Shadows = dict[int, tuple[torch.Tensor, torch.Tensor]]


def _shade(value: Any, shadows: _Shadows) -> Any:
    """Return an argument's shadow: the same one for the same tensor."""
    if isinstance(value, (list, tuple)):
        return type(value)([_shade(item, shadows) for item in value])
    if isinstance(value, torch.device):
        return _META
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in shadows:
        shadows[id(value)] = (value, _shadow(value))
    return shadows[id(value)][1]


def _foresee_growth(
    func: Any, values: list[Any], kwargs: dict[str, Any], card: SimulatedCard
) -> _Growth:
    """Take the bytes by which a mutating operator grows arguments, and of its results.

    It runs on meta tensors first; where it cannot, it is charged afterwards.

    Returns:
        Arguments whose storage grows, with what they will hold; what new results hold.

    Raises:
        torch.OutOfMemoryError: There is no room; nothing has changed.
    """
    __tracebackhide__ = True
    shadows: _Shadows = {}
    options = {name: _shade(each, shadows) for name, each in kwargs.items()}
    options.pop("generator", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the operator itself will say it
            made = func(*(_shade(value, shadows) for value in values), **options)
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        return [], []
    growing = []
    for value, shadow in shadows.values():
        if value.shape == shadow.shape and value.stride() == shadow.stride():
            continue
        skipped = int(value.storage_offset()) * value.element_size()
        nbytes = shadow.untyped_storage().nbytes() + skipped
        if nbytes > value.untyped_storage().nbytes():
            growing.append((value, Memory(card, nbytes)))
    known = {id(shadow) for _value, shadow in shadows.values()}
    results = [each for each in _tensors(made) if id(each) not in known]
    return growing, [Memory(card, each.untyped_storage().nbytes()) for each in results]


def _mutating(func: Any) -> Handler:
    draws = torch.Tag.nondeterministic_seeded in func.tags
    may_allocate = _may_allocate(func)

    def handler(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operands = _Operands()
        values = [operands.unwrap(arg) for arg in args]
        inner = {name: operands.unwrap(value) for name, value in kwargs.items()}
        if operands.host is not None or operands.strays is not None:
            _check_devices(func, args, operands)
        card = _any_card(operands.card)
        shapes = [
            (outer, outer._value.shape, outer._value.untyped_storage().nbytes())
            for outer in operands.outer.values()
        ]
        growing, made = (
            _foresee_growth(func, values, inner, card) if may_allocate else _NOTHING
        )
        out = run(func, values, inner, card, draws=draws)
        for value, memory in growing:
            hold(value.untyped_storage(), memory)
        if made:
            own = {id(each) for each in operands.outer_values()}
            results = [each for each in _tensors(out) if id(each) not in own]
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


def _same(value: Any, operands: _Operands, card: SimulatedCard) -> Any:
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
        return _mutating(func)
    handler = with_scratch(func.overloadpacket.__name__, _plain(func))
    return with_accumulation(func, handler)


HANDLERS.make = handler_for
