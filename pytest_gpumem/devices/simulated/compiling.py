"""``torch.compile`` and ``torch.export`` while the simulated device is installed.

TorchDynamo leaves code that meets a simulated tensor as it is, which is what the
backends without kernels of their own (eager, aot_eager) come to anyway: bytes and values
are right, operator by operator. One that makes kernels for a card would compile nothing
and prove nothing, and exporting ends in C++ that needs a driver: both are refused.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._subclasses.fake_tensor import FakeTensorConverter

from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Callable

#: Backends that need no kernels for a card. Source: ``torch/_dynamo/backends/debugging.py``.
BACKENDS: Final = frozenset(
    {
        "eager",
        "eager_noexcept",
        "eager_debug",
        "aot_eager",
        "aot_eager_default_partitioner",
    }
)

_original_compile: Final[Any] = torch.compile


def compiling(model: Any = None, **options: Any) -> Any:
    """``torch.compile``, refusing kernels for a simulated card.

    Raises:
        UnsupportedOnSimulatedDeviceError: When what was compiled meets a simulated
            tensor and the backend makes kernels.
    """
    _hide_from_dynamo()
    backend = options.get("backend", "inductor")
    if model is None:
        return functools.partial(compiling, **options)
    compiled = _original_compile(model, **options)
    if options.get("disable") or not isinstance(backend, str) or backend in BACKENDS:
        return compiled
    if isinstance(compiled, torch.nn.Module):
        compiled.forward = _checked(compiled.forward, model)
        return compiled
    return _checked(compiled, getattr(model, "__self__", None))


@functools.cache
def _hide_from_dynamo() -> None:
    """Have TorchDynamo run this package's own frames as they are.

    Otherwise it would compile the code that simulates the card.
    """
    from torch._dynamo import trace_rules  # noqa: PLC0415  # seconds, and only here

    trace_rules.add(__name__.partition(".")[0])


def _checked(function: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    """Return a function that refuses simulated tensors, its own or its module's."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        # With TORCH_COMPILE_DISABLE=1 torch runs what was to be compiled as it is.
        if _on_card(owner, args, kwargs) and not torch._dynamo.config.disable:
            refuse("a torch.compile backend that makes kernels")
        return function(*args, **kwargs)

    return call


def _on_card(owner: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an argument, or a module's parameter or buffer, is simulated."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    if isinstance(owner, torch.nn.Module):
        leaves.extend(owner.parameters())
        leaves.extend(owner.buffers())
    return any(isinstance(leaf, SimulatedTensor) for leaf in leaves)


def exporting(module: Any, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
    """``torch.export.export``, refusing what lies on a simulated card.

    Raises:
        UnsupportedOnSimulatedDeviceError: The module or its arguments do.
    """
    __tracebackhide__ = True
    if _on_card(module, args, kwargs):
        refuse("torch.export.export")
    return _original_export(module, args, kwargs, **options)


def faking(
    converter: Any, mode: Any, tensor: torch.Tensor, *rest: Any, **options: Any
) -> Any:
    """``FakeTensorConverter.from_real_tensor``, refusing what C++ would abort on.

    A fake tensor of a card that takes part in autograd asks the CUDA driver.

    Raises:
        UnsupportedOnSimulatedDeviceError: The tensor lies on a simulated card and
            requires gradients.
    """
    __tracebackhide__ = True
    if isinstance(tensor, SimulatedTensor) and tensor.requires_grad:
        refuse("FakeTensorMode.from_tensor")
    return _original_fake(converter, mode, tensor, *rest, **options)


_original_export: Final[Any] = torch.export.export
_original_fake: Final[Any] = FakeTensorConverter.from_real_tensor

#: Owner, name and replacement of each.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (torch, "compile", compiling),
    (torch.export, "export", exporting),
    (FakeTensorConverter, "from_real_tensor", faking),
)
