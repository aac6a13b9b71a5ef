"""Finds accelerators that are not NVIDIA's, without importing torch."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pytest_gpumem.devices.selection import TorchBuild

#: The folder in which Linux lists AMD's cards and processors. Only a card has SIMD units.
#: Source: the kernel's ``drivers/gpu/drm/amd/amdkfd/kfd_topology.c``, ``node_show``.
_AMD_NODES: Final = "sys/class/kfd/kfd/topology/nodes"
_SIMD_COUNT: Final = re.compile(r"^simd_count [1-9]", re.MULTILINE)
#: The environment variables that hide AMD's cards.
#: Source: ROCm documentation, "GPU isolation techniques".
_AMD_VARIABLES: Final = (
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
)
#: The folder in which Linux lists graphics devices, and Intel's PCI vendor id.
_RENDERERS: Final = "sys/class/drm"
_INTEL: Final = "0x8086"


def why_no_amd_card(root: Path = Path("/")) -> str | None:
    """Return why torch for ROCm cannot use a card here; None if it probably can.

    Args:
        root: The root folder of the system's files.
    """
    for name in _AMD_VARIABLES:
        if os.environ.get(name, "0").strip() in ("", "-1"):
            return f"{name} hides every card"
    nodes = root.joinpath(_AMD_NODES).glob("*/properties")
    if any(_SIMD_COUNT.search(_read(node)) for node in nodes):
        return None
    return "this machine has no AMD card that its kernel knows"


def other_accelerator(build: TorchBuild, root: Path = Path("/")) -> str | None:
    """Return the name of the accelerator that torch uses instead of CUDA, or None.

    Args:
        build: The build of the installed torch.
        root: The root folder of the system's files.
    """
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "Apple's GPU (mps)"
    makers = root.joinpath(_RENDERERS).glob("renderD*/device/vendor")
    if build.xpu and any(_read(maker).strip() == _INTEL for maker in makers):
        return "Intel's GPU (xpu)"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""  # the file cannot be read, or was just removed
