"""``torch.autocast("cuda")``: the dtype in which each operator runs on a card.

C++ decides by the device that it sees for a tensor, which for a simulated tensor is the
host. The casts are therefore made in this module, for each operator.

Sources: ``aten/src/ATen/autocast_mode.h``, which is installed with torch, for the list of
operators; ``autocast_mode.cpp`` for the casts, and for which casts are cached.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, NoReturn

import torch

from pytest_gpumem.devices.simulated.operators.declarations import autocast_names
from pytest_gpumem.devices.simulated.refusals import refusing
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_kept: Final = threading.local()
_clear: Final[Any] = torch.clear_autocast_cache


def clear_cache() -> None:
    """Run ``torch.clear_autocast_cache``: delete the cached casts of this region."""
    _kept.casts = {}
    _clear()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    if (
        not _is_on_card(value)
        or not value.is_floating_point()
        or value.dtype in (dtype, torch.float64)
    ):
        return value
    keeps = (
        isinstance(value, SimulatedTensor)
        and value.requires_grad
        and value.is_leaf
        and value.dtype == torch.float32
        and dtype == torch.get_autocast_dtype("cuda")
        and torch.is_autocast_cache_enabled()
    )
    if not keeps:
        return value.to(dtype)
    casts = _kept.__dict__.setdefault("casts", {})
    if id(value) not in casts:
        # The tensor is kept with its cast, so that no other tensor can get its id.
        casts[id(value)] = (value, value.to(dtype))
    return casts[id(value)][1]


def _is_on_card(value: Any) -> bool:
    """Return whether a value is a tensor on a card, also in a wrapper of ``torch.func``."""
    return isinstance(value, SimulatedTensor) or (
        isinstance(value, torch.Tensor) and value.is_cuda
    )


def _lower(_args: Any) -> torch.dtype:
    return torch.get_autocast_dtype("cuda")


def _fp32(_args: Any) -> torch.dtype:
    return torch.float32


def _widest(args: Any) -> torch.dtype:
    dtype = torch.get_autocast_dtype("cuda")
    return torch.float32 if torch.float32 in _dtypes(args) else dtype


def _dtypes(values: Iterable[Any]) -> set[torch.dtype]:
    dtypes: set[torch.dtype] = set()
    for value in values:
        if isinstance(value, (list, tuple)):
            dtypes |= _dtypes(value)
        elif isinstance(value, torch.Tensor):
            dtypes.add(value.dtype)
    return dtypes


_KEYS: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)


def _casting(operator: Any, choose: Callable[[Any], torch.dtype]) -> Any:
    """Return a kernel that casts the operands, the last one first.

    Source: ``WrapFunction_`` of ``aten/src/ATen/autocast_mode.h``, which casts in the
    arguments of a call. C++ leaves their order open; gcc, which builds torch for Linux,
    begins with the last.
    """

    def kernel(*args: Any, **options: Any) -> Any:
        dtype = choose(args)
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            named = {
                name: _cast(value, dtype) for name, value in reversed(options.items())
            }
            given = [_cast(arg, dtype) for arg in reversed(args)]
            return operator(*reversed(given), **named)

    return kernel


def _asking(operator: Any, wider: Any = None) -> Any:
    """Return a kernel that requests a single-precision result and casts no operand.

    Args:
        operator: The overload that is called.
        wider: The overload that takes a dtype, if ``operator`` takes none.
    """
    target = operator if wider is None else wider
    names = [each.name for each in target._schema.arguments]
    position = names.index("dtype")

    def kernel(*args: Any, **options: Any) -> Any:
        source = args[0]
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if not _is_on_card(source) or not _is_eligible(source):
                return operator(*args, **options)
            given = args[position] if position < len(args) else options.get("dtype")
            if given is not None:
                return operator(*args, **options)
            options["dtype"] = torch.float32
            for argument in operator._schema.arguments[len(args) :] if wider else ():
                options.setdefault(argument.name, argument.default_value)
            return target(*args[:position], **options)

    return kernel


def _is_eligible(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _refused(*_args: Any, **_options: Any) -> NoReturn:
    """Refuse ``binary_cross_entropy``: ``binary_cross_entropy_banned``.

    Raises:
        RuntimeError: Always (torch's message).
    """
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to "
        "autocast.\nMany models use a sigmoid layer right before the binary cross "
        "entropy layer.\nIn this case, combine the two layers using "
        "torch.nn.functional.binary_cross_entropy_with_logits\nor "
        "torch.nn.BCEWithLogitsLoss.  binary_cross_entropy_with_logits and "
        "BCEWithLogits are\nsafe to autocast."
    )


def _operator(name: str) -> Any:
    """Return an overload by its name; None if the installed torch does not have it."""
    packet, _dot, overload = name.partition(".")
    found = getattr(torch.ops.aten, packet, None)
    return getattr(found, overload or "default", None)


def kernels() -> dict[str, Any]:
    """Return the kernel of each operator that autocast changes, by name."""
    made: dict[str, Any] = {"binary_cross_entropy": _refused}
    for policy, choose in _CHOICES.items():
        for name in autocast_names(policy):
            made[name] = _casting(_operator(name), choose)
    for name in autocast_names("FP32_SET_OPT_DTYPE"):
        made[name] = _asking(_operator(name))
    for name, wider in _WITH_TYPE.items():
        made[name] = _asking(_operator(name), _operator(wider))
    return {name: kernel for name, kernel in made.items() if _operator(name)}


def register_casts(library: Any) -> None:
    """Register the casts with a ``torch.library.Library`` of ``aten``."""
    for name, kernel in kernels().items():
        library.impl(name, kernel, "AutocastCUDA")
    if not autocast_names("FP32"):
        for name in _IN_MOST_MODELS:
            refused = refusing("torch.autocast without torch's header files")
            library.impl(name, refused, "AutocastCUDA")


_CHOICES: Final = {
    "LOWER_PRECISION_FP": _lower,
    "FP32": _fp32,
    "PROMOTE": _widest,
}
_IN_MOST_MODELS: Final = (
    "addmm",
    "bmm",
    "conv2d",
    "layer_norm",
    "linear",
    "matmul",
    "mm",
)
#: Overloads that take no dtype, and those that take one: ``fp32_append_dtype``.
_WITH_TYPE: Final = {
    "norm.Scalar": "norm.ScalarOpt_dtype",
    "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype",
}
