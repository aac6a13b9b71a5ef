"""The records of operators for the simulated card, with one module for each family.

``registry.py`` describes the fields of a record. ``requests.py`` describes how to write
the rule for an operator's requests to the allocator.
"""

from __future__ import annotations

from pytest_gpumem.devices.simulated.operators import (  # each module adds its rows
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
    recurrent,
    reductions,
    small_products,
    sorting,
    spatial,
    transfers,
    trilinear,
)
from pytest_gpumem.devices.simulated.operators.registry import find, overloads

#: The modules of the operator families.
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
    recurrent,
    reductions,
    small_products,
    sorting,
    spatial,
    transfers,
    trilinear,
)

__all__ = ["FAMILIES", "find", "overloads"]
