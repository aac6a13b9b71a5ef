"""``torch.distributed`` on simulated cards: NCCL's groups, and what DDP does in C++.

* ``backend``: the class that stands for NCCL in a process group, its options and
  communicators.
* ``collectives``: what each of ``torch.ops.c10d`` does in a group of NCCL.
* ``functional``: the same of ``torch.ops._c10d_functional``.
* ``works``: a collective that is under way, and the errors it may end in.
* ``reducer``: the buckets of ``DistributedDataParallel``.

Note [How NCCL is simulated]
The process groups are torch's own, and so is everything above them. A collective of
tensors on cards comes to ``SimulatedTensor.__torch_dispatch__`` like any operator; in a
group of NCCL the values travel through gloo's C++ code, with NCCL's rules around it:
which tensors it takes, how it reduces, what it keeps on the card meanwhile. A
collective of tensors on the host never comes here, and torch itself says that the group
has no backend for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.tensor import Handler

#: Owner, name and replacement of each.
REPLACEMENTS: Final[list[tuple[Any, str, Any]]] = []

#: How the operators of a namespace run in groups of NCCL.
COLLECTIVES: Final[dict[str, Callable[[Any, Handler], Handler]]] = {}

if torch.distributed.is_available():  # it is not in every build
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
