"""Refuses to pass a card's memory to other code: kernels and libraries.

This cannot be simulated, because the bytes are not on a real card.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import torch

from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.devices.simulated.refusals import refuse, refusing
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

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


class TritonHook:
    """Refuses Triton kernels with simulated tensors, even if Triton is imported later."""

    def __init__(self) -> None:
        self._hook = AfterImport("triton", self._imported)
        self._patches = PatchSet()

    def start(self) -> None:
        """Replace Triton's launcher, now or when Triton is imported."""
        self._hook.start()

    def stop(self) -> None:
        """Restore the launcher; may be called twice."""
        self._hook.stop()
        self._patches.restore()

    def _imported(self) -> None:
        jit: Any = sys.modules["triton"].JITFunction
        original = jit.run

        def run(kernel: Any, *args: Any, **options: Any) -> Any:
            """Run ``kernel[grid](…)``; simulated tensors are refused."""
            operands = (*args, *options.values())
            if any(isinstance(each, SimulatedTensor) for each in operands):
                refuse("a Triton kernel")
            return original(kernel, *args, **options)

        self._patches.set(jit, "run", run)
