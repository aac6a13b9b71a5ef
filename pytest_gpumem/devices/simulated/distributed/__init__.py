"""``torch.distributed`` on simulated cards: NCCL groups, and the C++ part of DDP.

* ``backend``: the substitute for NCCL in a process group, its options and
  communicators.
* ``collectives``: runs each operator of ``torch.ops.c10d`` in an NCCL group.
* ``functional``: runs each operator of ``torch.ops._c10d_functional`` there.
* ``works``: a collective in progress, and the errors that it may raise.
* ``reducer``: the buckets of ``DistributedDataParallel``.

Note [How NCCL is simulated]
The process groups and all code above them are torch's own. A collective of tensors on
cards calls ``SimulatedTensor.__torch_dispatch__`` like any operator. In an NCCL group,
gloo's C++ code sends the values. NCCL's rules apply: which tensors are accepted, how
values are reduced, and which memory is held on the card meanwhile. A collective of host
tensors is not handled here; torch itself raises the error that the group has no backend
for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.tensor import Handler

#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[list[tuple[Any, str, Any]]] = []

#: The function that makes the handlers of each namespace of operators.
COLLECTIVES: Final[dict[str, Callable[[Any, Handler], Handler]]] = {}

if torch.distributed.is_available():  # not every build has it
    from pytest_gpumem.devices.simulated.distributed import (
        backend,
        collectives,
        functional,
        reducer,
    )

    REPLACEMENTS[:] = [*backend.REPLACEMENTS, *reducer.REPLACEMENTS]
    COLLECTIVES["c10d"] = collectives.collective_handler
    COLLECTIVES["_c10d_functional"] = functional.functional_handler
    COLLECTIVES["_dtensor"] = functional.functional_handler
