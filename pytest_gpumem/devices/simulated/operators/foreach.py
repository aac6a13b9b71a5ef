"""Operators on lists of tensors: foreach, fused optimisers, gradient scaling."""

from __future__ import annotations

from pytest_gpumem.devices.simulated.operators.checks import iterated
from pytest_gpumem.devices.simulated.operators.registry import register

register(
    "_foreach_*",
    check=iterated,
    source="ForeachUtils.h, can_use_fast_route: no, so element by element",
)
# Optimisers keep the step counters on the host.
register(
    "_foreach_add_ _foreach_copy_",
    check=iterated,
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
