"""How the CPU computes the values of an operator of the simulated device."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.refusals import refuse_value
from pytest_gpumem.devices.simulated.rng import Moving, generator_of
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.operators.registry import Operator
    from pytest_gpumem.devices.simulated.rng import Drawing

#: Keys that torch excludes while Python runs an operator. C++ that composes one of
#: others leaves it to them to heed the marks of lazy conjugation.
_LAZY_MARKS: Final = ("Conjugate", "Negative", "ZeroTensor")
_COMPOSITE: Final = (
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)


def computing(func: Any, operator: Operator) -> Callable[..., Any]:
    """Return what computes the values of an overload: its record's, or the CPU's own."""
    compute = operator.compute and operator.compute(func)
    chosen: Callable[..., Any] = compute or func
    is_inside = _is_composite(func) or any(
        each.is_out for each in func._schema.arguments
    )
    return _heeding_marks(chosen) if is_inside else chosen


def _is_composite(func: Any) -> bool:
    """Tell whether C++ composes an operator of others; views and kernels it does not."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # no public name
    name = func.name()
    return (
        not has_kernel(name, "CPU")
        and any(has_kernel(name, key) for key in _COMPOSITE)
        and not any(map(is_view, func._schema.returns))  # likewise
    )


def is_view(result: Any) -> bool:
    """Tell whether a result shares memory with an argument that is not written to."""
    return result.alias_info is not None and not result.alias_info.is_write


def _heeding_marks(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a computation that heeds lazy conjugation inside itself."""

    def heeding(*args: Any, **kwargs: Any) -> Any:
        if not any(map(_is_complex, (*args, *kwargs.values()))):
            return compute(*args, **kwargs)
        excluded = torch._C._dispatch_tls_local_exclude_set()  # no public name
        for name in _LAZY_MARKS:
            excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
        included = torch._C._dispatch_tls_local_include_set()  # no public name
        with torch._C._ForceDispatchKeyGuard(included, excluded):  # no public name
            return compute(*args, **kwargs)

    return heeding


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


#: How kernels of the CPU say that they lack what a card's may have.
_LIMIT: Final = re.compile(
    r"(support|implemented)\b.*\bCPU\b|\bCPU\b.*\b(support|implemented)", re.IGNORECASE
)
#: How a kernel says that it lacks a type. Source: ``AT_DISPATCH_SWITCH`` of
#: ``aten/src/ATen/Dispatch.h``; ``Sorting.cpp``.
_LACKS_TYPE: Final = re.compile(
    r"\"\w+\" not implemented for '\w+'| ?\w+ does not support \w+ dtypes on CPU"
)


def _is_the_cpus(error: RuntimeError) -> bool:
    """Tell whether it is the CPU that lacks a kernel."""
    text = str(error)
    if _LIMIT.search(text):
        return True
    return isinstance(error, NotImplementedError) and "'CPU' backend" in text


def _check_type(error: RuntimeError) -> None:
    """Refuse a type that the CPU's kernel lacks, as a card's kernel does.

    A card has kernels for every type that the CPU has them for, but for those that the
    operators' records name, and for few others, whose records compute them in another way.

    Raises:
        RuntimeError: Of the class that it is, if that is the error.
    """
    __tracebackhide__ = True
    text = str(error)
    if _LACKS_TYPE.match(text):
        text = text.replace("_cpu", "_cuda", 1).replace("on CPU", "on CUDA")
        raise type(error)(text) from None


def _without_value(value: Any) -> Any:
    """Return a single number of the host as a shape; meta kernels refuse to mix."""
    is_number = isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_cpu
    return value.to("meta") if is_number else value


def run(
    func: Any,
    args: Any,
    kwargs: dict[str, Any],
    card: SimulatedCard,
    *,
    draw: Drawing | None,
    compute: Callable[..., Any] | None = None,
) -> Any:
    """Run an operator on the tensors with the values.

    Args:
        func: The operator.
        args: Its arguments, on the CPU, or on meta where no values are kept.
        kwargs: Its keyword arguments.
        card: The card that computes.
        draw: How the operator draws from the card's generator, if it does.
        compute: What computes the values; None means the operator.

    Raises:
        NoValuesError: The result depends on values, and none are kept.
        NotImplementedError: No kernel is compiled for the operands' type.
        UnsupportedOnSimulatedDeviceError: The operator has no CPU kernel.
    """
    compute = func if compute is None else compute
    if card.value_device == "meta":
        args = [_without_value(each) for each in args]
    try:
        if draw is not None and card.value_device != "meta":
            return draw(generator_of(card), args, kwargs)
        result = compute(*args, **kwargs)
        if isinstance(draw, Moving):
            draw.note(generator_of(card), args, kwargs, result)
        return result  # noqa: TRY300  # what is raised above is looked at below
    except RuntimeError as error:
        lacks_values = card.value_device == "meta" and (
            isinstance(error, NotImplementedError)
            or "called on meta tensors" in str(error)
        )
        if not lacks_values:
            _check_type(error)
            if not _is_the_cpus(error):
                raise
    if lacks_values:
        refuse_value(str(func))
    raise UnsupportedOnSimulatedDeviceError(
        str(func), "it has no CPU kernel to take the values from; run it on a real card"
    )
