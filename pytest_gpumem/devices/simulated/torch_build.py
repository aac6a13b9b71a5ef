"""Makes torch report a build for CUDA while cards are simulated."""

from __future__ import annotations

import sys
from typing import Any, Final

import torch

from pytest_gpumem.cards import CUDA_VERSION
from pytest_gpumem.devices.simulated.machine import current_machine

#: Version that a CUDA build reports, for an installed CPU build.
#: Source: the wheels that ``pip install torch`` takes on Linux, torch 2.13.
CUDNN_VERSION: Final = 91300
#: Source: the required version of ``nvidia-nccl-cu13`` in torch 2.13's Linux wheels.
NCCL_VERSION: Final = (2, 29, 7)


def _references_by_cpp() -> int:
    """Return how many references to a tensor's Python object C++ has while it holds it."""
    tensor = torch.zeros(1, device="cpu", requires_grad=True)
    before = sys.getrefcount(tensor)
    with torch.inference_mode(mode=False), torch.enable_grad():
        held = tensor * 1  # its graph holds the tensor
    found = sys.getrefcount(tensor) - before
    del held
    return found


#: 1; up to torch 2.9 it is 0, because then either object owns the other one.
REFERENCES_BY_CPP: Final = _references_by_cpp()


class _Cudnn:
    """Replaces ``torch._C._cudnn``, which has the versions of cuDNN."""

    is_cuda = True

    @staticmethod
    def getVersionInt() -> int:  # noqa: N802  # torch's name
        """Return the version as one number."""
        return CUDNN_VERSION

    @staticmethod
    def getRuntimeVersion() -> tuple[int, int, int]:  # noqa: N802  # torch's name
        """Return the parts of the version."""
        major, rest = divmod(CUDNN_VERSION, 10_000)
        return major, *divmod(rest, 100)

    getCompileVersion = getRuntimeVersion  # noqa: N815  # torch's name


def compiled_version() -> int:
    """Return the CUDA version that torch was built for, in the form of ``CUDA_VERSION``."""
    major, minor = (torch.version.cuda or CUDA_VERSION).split(".")[:2]
    return int(major) * 1000 + int(minor) * 10


def _set_limit(limit: int) -> None:
    current_machine().cudnn["limit"] = limit


_LIMIT: Final = torch.backends.ContextProp(
    lambda: current_machine().cudnn["limit"], _set_limit
)


def build_names() -> list[tuple[Any, str, Any]]:
    """Return owner, name and value of the attributes that describe a CUDA build.

    In a CUDA build these attributes exist already. Libraries read the CUDA version, and
    assume that a build without one is for the CPU.
    """
    if torch.version.cuda is not None:
        return []
    cudnn: Any = torch.backends.cudnn
    return [
        (type(cudnn), "benchmark_limit", _LIMIT),
        (torch.version, "cuda", CUDA_VERSION),
        (torch.backends.cuda, "is_built", lambda: True),
        (torch.backends.cudnn, "version", lambda: CUDNN_VERSION),
        (torch.backends.cudnn, "is_available", lambda: True),
        # Names that torch's Python code imports in a CUDA build; CUDA graph trees are refused.
        (
            torch._C,
            "_cuda_CUDAAllocator_AllocatorState",
            type("AllocatorState", (), {}),
        ),
        (torch._C, "_cudnn", _Cudnn),
        (torch._C, "_set_cached_tensors_enabled", lambda _enabled: None),
    ]
