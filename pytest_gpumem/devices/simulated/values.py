"""Computes the values of the simulated device's operators on the CPU."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.cuda_errors import cuda_error
from pytest_gpumem.devices.simulated.error_texts import is_asserted, on_card
from pytest_gpumem.devices.simulated.kernel_types import COMPLEX_HALVES
from pytest_gpumem.devices.simulated.layouts import TWO_LAYOUTS, as_on_cpu
from pytest_gpumem.devices.simulated.refusals import refuse_value
from pytest_gpumem.devices.simulated.rng import Moving, generator_of
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.operators.registry import Operator
    from pytest_gpumem.devices.simulated.rng import Drawing

#: Keys that torch excludes while Python runs an operator. A C++ operator that is composed
#: of others relies on these others to resolve lazy conjugation.
_LAZY_MARKS: Final = ("Conjugate", "Negative", "ZeroTensor")
_COMPOSITE: Final = (
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)


def computing(func: Any, operator: Operator) -> Callable[..., Any]:
    """Return the function that computes an overload: of its record, or the CPU's own."""
    compute = operator.compute and operator.compute(func)
    chosen: Callable[..., Any] = compute or func
    is_inside = _is_composite(func) or any(
        each.is_out for each in func._schema.arguments
    )
    return _heeding_marks(chosen) if is_inside else chosen


def _is_composite(func: Any) -> bool:
    """Return whether C++ composes an operator of others; views and kernels do not count."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # no public API
    name = func.name()
    return (
        not has_kernel(name, "CPU")
        and any(has_kernel(name, key) for key in _COMPOSITE)
        and not any(map(is_view, func._schema.returns))  # no public API
    )


def is_view(result: Any) -> bool:
    """Return whether a result shares memory with an argument that is not written to."""
    return result.alias_info is not None and not result.alias_info.is_write


def _heeding_marks(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Return a computation that resolves lazy conjugation inside the operator."""

    def heeding(*args: Any, **kwargs: Any) -> Any:
        if not any(map(_is_complex, (*args, *kwargs.values()))):
            return compute(*args, **kwargs)
        excluded = torch._C._dispatch_tls_local_exclude_set()  # no public API
        for name in _LAZY_MARKS:
            excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
        included = torch._C._dispatch_tls_local_include_set()  # no public API
        with torch._C._ForceDispatchKeyGuard(included, excluded):  # no public API
            return compute(*args, **kwargs)

    return heeding


def _is_complex(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_complex()


#: Error messages of CPU kernels for a feature that a card's kernel may have.
_LIMIT: Final = re.compile(
    r"(support|implemented)\b.*\bCPU\b|\bCPU\b.*\b(support|implemented)", re.IGNORECASE
)


def _is_the_cpus(error: RuntimeError) -> bool:
    """Return whether an error means that the CPU has no such kernel."""
    text = str(error)
    if _LIMIT.search(text):
        return True
    return isinstance(error, NotImplementedError) and "'CPU' backend" in text


def _without_value(value: Any) -> Any:
    """Return a single host number as a meta tensor; meta kernels need this."""
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
    """Run an operator on the tensors that hold the values.

    Args:
        func: The operator.
        args: The positional arguments, on the CPU, or on meta if no values are kept.
        kwargs: The keyword arguments.
        card: The card on which the operator runs.
        draw: The function that draws from the card's generator, or None.
        compute: The function that computes the values; None means the operator.

    Raises:
        torch.AcceleratorError: An assertion of a card's kernel fails, for example for
            an index out of bounds.
        NoValuesError: The result depends on values, and none are kept.
        NotImplementedError: There is no kernel for the operands' dtype.
        UnsupportedOnSimulatedDeviceError: The operator has no CPU kernel.
    """
    # The method is called directly, so that tracebacks have no further frame.
    compute = func._op if compute is None else compute
    if card.value_device == "meta":
        args = [_without_value(each) for each in args]
    try:
        if draw is not None and card.value_device != "meta":
            return draw(generator_of(card), args, kwargs)
        if TWO_LAYOUTS and draw is None:
            return as_on_cpu(func, compute, args, kwargs)
        result = compute(*args, **kwargs)
        if isinstance(draw, Moving):
            draw.note(generator_of(card), args, kwargs, result)
        return result  # noqa: TRY300  # the except blocks are for the calls above
    except (IndexError, RuntimeError) as error:
        raised = _as_on_card(error, func, args, card)
        if raised is error:
            raise
        raise raised from None


def _as_on_card(
    error: IndexError | RuntimeError, func: Any, args: Any, card: SimulatedCard
) -> Exception:
    """Return the error that a card raises in place of an error of the CPU's kernel."""
    text = str(error)
    if is_asserted(text):
        asserted = cuda_error("cudaErrorAssert")
        if hasattr(asserted, "add_note"):  # from Python 3.11 on
            asserted.add_note(f"the simulated card found: {text}")
        return asserted
    if isinstance(error, IndexError):
        return error
    if card.value_device == "meta" and (
        isinstance(error, NotImplementedError) or "called on meta tensors" in text
    ):
        refuse_value(str(func))
    # A card and the CPU have kernels for the same dtypes, with two exceptions. Dtypes that
    # a card lacks are named in the operators' records. For the few dtypes that only a card
    # has, the records compute the values in another way.
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    is_known = "'ComplexHalf'" in text and name in COMPLEX_HALVES
    words = None if is_known else on_card(func, args, text)
    if words is not None:
        return type(error)(words)
    if not is_known and not _is_the_cpus(error):
        return error
    return UnsupportedOnSimulatedDeviceError(
        str(func), "it has no CPU kernel to take the values from; run it on a real card"
    )
