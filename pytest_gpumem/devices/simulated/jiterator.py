"""``torch.cuda.jiterator``: kernels that a user wrote in CUDA C++.

The host cannot run these kernels, but their requests for memory are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make

if TYPE_CHECKING:
    from collections.abc import Sequence


def launch(  # the signature of C++
    _code: str,
    _name: str,
    _returns_by_reference: bool,  # noqa: FBT001
    count: int,
    tensors: Sequence[torch.Tensor],
    _numbers: dict[str, Any],
) -> Any:
    """Return results without values, in the operands' common shape and dtype.

    Source: ``CompileAndLaunchKernel`` of ``aten/src/ATen/cuda/jiterator.cu``.

    Raises:
        RuntimeError: An operand is not on the card of the first one (torch's message).
        UnsupportedOnSimulatedDeviceError: The card keeps values.
    """
    first = tensors[0]
    if not isinstance(first, SimulatedTensor):
        raise RuntimeError(  # noqa: TRY004  # torch raises this class
            "CUDAGuardImpl initialized with non-CUDA DeviceType: cpu"
        )
    for each in tensors:
        if each.device != first.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two "
                f"devices, {first.device} and {each.device}!"
            )
    card = first._gpumem_card
    if card.value_device != "meta":
        refuse("torch.cuda.jiterator")
    values = [each._gpumem_value for each in tensors]  # type: ignore[attr-defined]  # all tensors are on a card
    made = []
    for _result in range(count):
        result = torch.empty_like(values[0])
        for value in values[1:]:
            result = torch.add(result, value)
        made.append(make(result, card))
    return made[0] if count == 1 else tuple(made)
