"""``torch.use_deterministic_algorithms``, with a card's list of operators.

Source: the callers of ``alertNotDeterministic`` in ``aten/src/ATen/native/cuda``, and
``alertCuBLASConfigNotDeterministic`` of ``aten/src/ATen/Context.cpp``, torch 2.13.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.operators.registry import Operator
    from pytest_gpumem.devices.simulated.tensor import Handler

#: Values of ``CUBLAS_WORKSPACE_CONFIG`` with which cuBLAS is deterministic.
_CUBLAS_SETTINGS: Final = (":4096:8", ":16:8")


def with_alert(func: Any, operator: Operator, handler: Handler) -> Handler:
    """Return a handler that raises or warns if a card has no deterministic kernel."""
    caller, alerts = operator.alert, operator.alerts
    if not caller:
        return handler

    def alerting(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.are_deterministic_algorithms_enabled() and (
            alerts is None or alerts(func, args, kwargs)
        ):
            _alert(caller)
        return handler(args, kwargs)

    return alerting


def _alert(caller: str) -> None:
    """Raise or warn, as ``Context::alertNotDeterministic`` does."""
    if torch.is_deterministic_algorithms_warn_only_enabled():
        warnings.warn(
            f"{caller} does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True, warn_only=True)'. You can file an "
            "issue at https://github.com/pytorch/pytorch/issues to help us prioritize "
            "adding deterministic support for this operation.",
            stacklevel=5,
        )
        return
    raise RuntimeError(
        f"{caller} does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just "
        "for this operation, or you can use the 'warn_only=True' option, if that's "
        "acceptable for your application. You can also file an issue at "
        "https://github.com/pytorch/pytorch/issues to help us prioritize adding "
        "deterministic support for this operation."
    )


def check_cublas() -> None:
    """Raise or warn if cuBLAS is not configured to be deterministic.

    Raises:
        RuntimeError: With torch's message.
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") in _CUBLAS_SETTINGS:
        return
    text = (
        "Deterministic behavior was enabled with either "
        "`torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
        "deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable "
        "deterministic behavior in this case, you must set an environment variable "
        "before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or "
        "CUBLAS_WORKSPACE_CONFIG=:16:8. For more information, go to "
        "https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"
    )
    if torch.is_deterministic_algorithms_warn_only_enabled():
        warnings.warn(text, stacklevel=5)
        return
    raise RuntimeError(text)
