"""``torch.autocast("cuda")``: which operators run in which type on a card.

C++ decides by what it takes for a tensor's device, which for a simulated tensor is the
host; so the casts are made here, operator by operator.

Source: PyTorch's documentation, "CUDA Ops that can autocast to float16", "… to float32"
and "CUDA Ops that promote to the widest input type"
(docs.pytorch.org/docs/stable/amp.html), for the operators that they dispatch to, each in
its record (``operators/``); the rule for kept casts is ``cached_cast`` of
``aten/src/ATen/autocast_mode.cpp``.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.operators import overloads
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_kept: Final = threading.local()
_clear: Final[Any] = torch.clear_autocast_cache


def clear_cache() -> None:
    """``torch.clear_autocast_cache``: forget the casts kept for this region."""
    _kept.casts = {}
    _clear()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    if (
        not isinstance(value, SimulatedTensor)
        or not value.is_floating_point()
        or value.dtype in (dtype, torch.float64)
    ):
        return value
    keeps = (
        value.requires_grad
        and value.is_leaf
        and value.dtype == torch.float32
        and dtype == torch.get_autocast_dtype("cuda")
        and torch.is_autocast_cache_enabled()
    )
    if not keeps:
        return value.to(dtype)
    casts = _kept.__dict__.setdefault("casts", {})
    if id(value) not in casts:
        # The tensor is kept with its cast, so that its id stays its own.
        casts[id(value)] = (value, value.to(dtype))
    return casts[id(value)][1]


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


def _kernel(operator: Any, choose: Callable[[Any], torch.dtype]) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

    def kernel(*args: Any, **options: Any) -> Any:
        dtype = choose(args)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(
                *(_cast(arg, dtype) for arg in args),
                **{name: _cast(value, dtype) for name, value in options.items()},
            )

    return kernel


_CHOICES: Final = {"lower": _lower, "float32": _fp32, "widest": _widest}


def register(library: Any) -> None:
    """Register the casts with a ``torch.library.Library`` of ``aten``."""
    for name, overload, operator in overloads():
        cast = operator.autocast
        if cast is not None and overload._overloadname in cast.overloads:
            library.impl(name, _kernel(overload, _CHOICES[cast.to]), "AutocastCUDA")
