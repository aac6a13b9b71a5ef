"""Refuses to pass a card's memory to other code: kernels and libraries.

This cannot be simulated, because the bytes are not on a real card.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.refusals import refuse, refusing
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from pytest_gpumem.devices.patches import PatchSet

_dlpack: Final[Any] = torch.utils.dlpack
_original_to_dlpack: Final[Any] = _dlpack.to_dlpack


def to_dlpack(tensor: torch.Tensor) -> Any:
    """Run ``torch.utils.dlpack.to_dlpack``; a tensor on a card is refused.

    Raises:
        UnsupportedOnSimulatedDeviceError: The tensor is on a card.
    """
    if isinstance(tensor, SimulatedTensor):
        refuse("tensor.__dlpack__")
    return _original_to_dlpack(tensor)


#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (_dlpack, "to_dlpack", to_dlpack),
    (torch, "to_dlpack", to_dlpack),
    (torch._C, "_to_dlpack", to_dlpack),
    (torch.cuda, "_compile_kernel", refusing("torch.cuda._compile_kernel")),
)


def patch_triton(patches: PatchSet) -> None:
    """Refuse Triton kernels with simulated tensors: replace Triton's launcher."""
    jit: Any = sys.modules["triton"].JITFunction
    original = jit.run

    def run(kernel: Any, *args: Any, **options: Any) -> Any:
        """Run ``kernel[grid](…)``; simulated tensors are refused."""
        operands = (*args, *options.values())
        if any(isinstance(each, SimulatedTensor) for each in operands):
            refuse("a Triton kernel")
        return original(kernel, *args, **options)

    patches.set(jit, "run", run)
