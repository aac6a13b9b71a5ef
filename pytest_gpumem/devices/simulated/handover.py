"""Refuses to pass a card's memory to other code: kernels, libraries, processes.

This cannot be simulated, because the bytes are not on a real card.
"""

from __future__ import annotations

import sys
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

import torch

from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.devices.simulated.memory import memory_of
from pytest_gpumem.devices.simulated.refusals import refuse, refusing
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

_dlpack: Final[Any] = torch.utils.dlpack
_original_to_dlpack: Final[Any] = _dlpack.to_dlpack
_original_share: Final[Any] = torch.UntypedStorage._share_cuda_


def to_dlpack(tensor: torch.Tensor) -> Any:
    """Run ``torch.utils.dlpack.to_dlpack``; a tensor on a card is refused.

    Raises:
        UnsupportedOnSimulatedDeviceError: The tensor is on a card.
    """
    if isinstance(tensor, SimulatedTensor):
        refuse("tensor.__dlpack__")
    return _original_to_dlpack(tensor)


def _share(self: torch.UntypedStorage, *args: Any) -> Any:
    if memory_of(self) is not None:
        refuse("sharing a tensor of a card with another process")
    return _original_share(self, *args)


#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (_dlpack, "to_dlpack", to_dlpack),
    (torch, "to_dlpack", to_dlpack),
    (torch._C, "_to_dlpack", to_dlpack),
    (torch.UntypedStorage, "_share_cuda_", _share),
    (torch.cuda, "_compile_kernel", refusing("torch.cuda._compile_kernel")),
)

_refuse_sending: Final[Any] = refusing(
    "sharing a tensor of a card with another process"
)


def patch_queues(patches: PatchSet) -> None:
    """Refuse to send a card's tensors through multiprocessing's queues and pipes."""
    reducers: Any = ForkingPickler._extra_reducers  # type: ignore[attr-defined]  # the dictionary that ``register`` changes
    patches.put(reducers, SimulatedTensor, _refuse_sending)


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
