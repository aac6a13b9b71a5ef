"""What the simulated card knows about operators: one record each, by family.

``registry.py`` says what a record holds, ``requests.py`` how to write down what an
operator asks of the allocator.
"""

from __future__ import annotations

from pytest_gpumem.devices.simulated.operators import (  # each adds its rows
    attention,
    convolutions,
    drawing,
    embeddings,
    foreach,
    indexing,
    linear_algebra,
    losses,
    normalisation,
    pointwise,
    reductions,
    sorting,
    spatial,
    transfers,
    trilinear,
)
from pytest_gpumem.devices.simulated.operators.registry import find, overloads

#: The families of operators.
FAMILIES = (
    attention,
    convolutions,
    drawing,
    embeddings,
    indexing,
    linear_algebra,
    foreach,
    losses,
    normalisation,
    pointwise,
    reductions,
    sorting,
    spatial,
    transfers,
    trilinear,
)

__all__ = ["FAMILIES", "find", "overloads"]
