"""Where a model's weights are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.nn.parameter import is_lazy

from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's weights are.

    Attributes:
        bytes_by_device: Bytes of parameters and buffers by device, for example
            ``{"cuda:0": 1340583944}``; what is offloaded counts as ``"meta"``.
        dtypes: Dtypes of the floating-point parameters.
        device_map: The map that accelerate dispatched by; None without one.
    """

    bytes_by_device: dict[str, int]
    dtypes: frozenset[torch.dtype]
    device_map: dict[str, str] | None

    @property
    def devices(self) -> frozenset[str]:
        """The devices that hold weights."""
        return frozenset(self.bytes_by_device)

    @property
    def is_whole(self) -> bool:
        """Whether all weights are in one place, or spread by a device map."""
        return len(self.bytes_by_device) <= 1 or self.device_map is not None

    def __str__(self) -> str:
        places = ", ".join(
            f"{format_size(nbytes)} on {device}"
            for device, nbytes in sorted(self.bytes_by_device.items())
        )
        dtypes = ", ".join(sorted(str(dtype) for dtype in self.dtypes))
        spread = " by a device map" if self.device_map is not None else ""
        return f"{places}{spread} ({dtypes})"


def placement_of(model: torch.nn.Module) -> Placement:
    """Return where a model's parameters and buffers are; tied ones count once."""
    nbytes: Counter[str] = Counter()
    dtypes = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if is_lazy(tensor):
            continue  # it has no size yet
        nbytes[str(tensor.device)] += tensor.numel() * tensor.element_size()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            dtypes.add(parameter.dtype)
    device_map: Any = getattr(model, "hf_device_map", None)
    if device_map is not None:
        device_map = {name: str(device) for name, device in device_map.items()}
        if len(set(device_map.values())) == 1:
            device_map = None
    return Placement(dict(nbytes), frozenset(dtypes), device_map)
