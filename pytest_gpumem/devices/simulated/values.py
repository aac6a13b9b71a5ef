"""How the CPU computes the values of an operator of the simulated device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated import rng
from pytest_gpumem.errors import NoValuesError, UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

#: Where the CPU's kernel does not know what a card's does: what to call instead.
COMPUTED: Final[dict[Any, Callable[..., Any]]] = {}

#: Keys that torch excludes while Python runs an operator. C++ that composes one of
#: others leaves it to them to heed the marks of lazy conjugation.
_LAZY_MARKS: Final = ("Conjugate", "Negative", "ZeroTensor")
_COMPOSITE: Final = (
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)


def computing(func: Any) -> Callable[..., Any]:
    """Return what computes the values of an operator."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # no public name
    compute: Callable[..., Any] = COMPUTED.get(func, func)
    if any(has_kernel(func.name(), key) for key in _COMPOSITE):
        return _heeding_marks(compute)
    return compute


def _heeding_marks(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a computation that heeds lazy conjugation inside itself."""

    def heeding(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(arg, torch.Tensor) and arg.is_complex() for arg in args):
            return compute(*args, **kwargs)
        excluded = torch._C._dispatch_tls_local_exclude_set()  # no public name
        for name in _LAZY_MARKS:
            excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
        included = torch._C._dispatch_tls_local_include_set()  # no public name
        with torch._C._ForceDispatchKeyGuard(included, excluded):  # no public name
            return compute(*args, **kwargs)

    return heeding


def run(
    func: Any, args: Any, kwargs: dict[str, Any], card: SimulatedCard, *, draws: bool
) -> Any:
    """Run an operator on the tensors with the values.

    Args:
        func: The operator, or what computes its values.
        args: Its arguments, on the CPU, or on meta where no values are kept.
        kwargs: Its keyword arguments.
        card: The card that computes.
        draws: Whether the operator draws from the card's random state.

    Raises:
        NoValuesError: The result depends on values, and none are kept.
        UnsupportedOnSimulatedDeviceError: The operator has no CPU kernel.
    """
    try:
        if draws:
            with rng.drawing_for(card):
                return func(*args, **kwargs)
        return func(*args, **kwargs)
    except RuntimeError as error:
        lacks_kernel = isinstance(error, NotImplementedError)
        lacks_values = card.value_device == "meta" and (
            lacks_kernel or "called on meta tensors" in str(error)
        )
        if not lacks_values and not (lacks_kernel and "'CPU' backend" in str(error)):
            raise
    if lacks_values:
        raise NoValuesError(str(func))
    raise UnsupportedOnSimulatedDeviceError(
        str(func), "it has no CPU kernel to take the values from; run it on a real card"
    )
