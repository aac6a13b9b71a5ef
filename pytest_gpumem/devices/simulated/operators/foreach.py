"""Operators on lists of tensors: foreach, fused optimisers, gradient scaling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpumem.devices.simulated.operators.checks import iterated
from pytest_gpumem.devices.simulated.operators.registry import register

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.operators.checks import Operand


def _elements(func: Any, places: list[Operand]) -> None:
    """Check each element of the lists; a single number for all must be on the card."""
    number = places[-1]
    if func._overloadname == "Tensor" and number.device != places[0].device:
        raise RuntimeError(
            f"scalar tensor expected to be on {places[0].device} but is on "
            f"{number.device}"
        )
    iterated(func, places)


register(
    "_foreach_*",
    check=_elements,
    source="cuda/ForeachBinaryOpScalarTensor.cu; ForeachUtils.h",
)
# Optimisers keep the step counters on the host.
register(
    "_foreach_add_ _foreach_copy_",
    check=_elements,
    takes_host=True,
    source="ForeachUtils.h, can_use_fast_route: no, so element by element",
)
register(
    """
    _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_ _fused_adagrad_
    _fused_adam_ _fused_adamw_ _fused_sgd_
    """,
    takes_host=True,
    source="native_functions.yaml, device_check: NoCheck",
)
