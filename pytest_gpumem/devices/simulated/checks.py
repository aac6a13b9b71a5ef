"""What a card refuses to take: torch's own errors, for operands of other devices."""

from __future__ import annotations

from typing import Any, Final

import torch

from pytest_gpumem.devices.simulated.rng import CardGenerator

#: Operators that take indices, by packet name.
INDEXING: Final = frozenset(
    {
        "index",
        "index_put",
        "index_put_",
        "_index_put_impl_",
        "_unsafe_index",
        "_unsafe_index_put",
    }
)


def check_indexing(target: torch.Tensor, indices: Any, values: Any) -> None:
    """Refuse indices of another card than the indexed tensor's, and host values.

    Source: ``aten/src/ATen/TensorIndexing.h`` and
    ``aten/src/ATen/native/TensorAdvancedIndexing.cpp``: indices may be the host's, a
    value only if it is a single number.

    Raises:
        RuntimeError: With torch's text.
    """
    for index in indices:
        if index is not None and index.device not in (target.device, _HOST):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed "
                f"tensor ({target.device})"
            )
    if (
        isinstance(values, torch.Tensor)
        and values.device != target.device
        and values.dim() > 0
    ):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, {target.device} and {values.device}!"
        )


_HOST: Final = torch.device("cpu")


def check_generator(generator: Any, kind: str) -> None:
    """Refuse a generator of the other kind of device.

    Limits: only constructors can tell; C++ forgets the class of a generator.

    Source: ``check_generator`` of ``aten/src/ATen/core/Generator.h``.

    Raises:
        RuntimeError: With torch's text.
    """
    found = "cuda" if isinstance(generator, CardGenerator) else "cpu"
    if found != kind:
        raise RuntimeError(
            f"Expected a '{kind}' device type for generator but found '{found}'"
        )
