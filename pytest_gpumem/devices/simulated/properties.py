"""The result of ``torch.cuda.get_device_properties`` for a simulated card."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_gpumem.cards import Card, Gpu

_MIB = 2**20


class _Uuid:
    """A card's UUID in the form of ``torch._C._CUuuid``: a text, and its sixteen bytes."""

    def __init__(self, text: str) -> None:
        self._text = text

    @property
    def bytes(self) -> list[int]:
        """The sixteen bytes."""
        return list(bytes.fromhex(self._text.replace("-", "")))

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Uuid) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)


class DeviceProperties:
    """A card's properties under torch's names; ``total_memory`` is in bytes.

    Limits: only the properties that follow from a card's table row and its compute
    capability exist; any other property raises ``AttributeError``.
    """

    def __init__(self, card: Card, gpu: Gpu, uuid: str) -> None:
        self.name = card.name
        self.major, self.minor = card.compute_capability
        self.total_memory = card.total_bytes
        self.multi_processor_count = card.multi_processor_count
        self.is_integrated = int(card.is_integrated)
        self.is_multi_gpu_board = 0
        self.warp_size = 32
        self.max_threads_per_block = 1024
        self.max_threads_per_multi_processor = card.max_threads_per_multi_processor
        self.regs_per_multiprocessor = card.regs_per_multiprocessor
        self.shared_memory_per_block = card.shared_memory_per_block
        self.shared_memory_per_block_optin = card.shared_memory_per_block_optin
        self.shared_memory_per_multiprocessor = card.shared_memory_per_multiprocessor
        self.L2_cache_size = card.l2_cache_size
        self.gcnArchName = f"sm_{self.major}{self.minor}"
        self.pci_bus_id = gpu.bus
        self.pci_device_id = 0
        self.pci_domain_id = 0
        self.uuid = _Uuid(uuid.partition("-")[2])

    def __getattr__(self, name: str) -> object:
        raise AttributeError(
            f"the simulated card has no {name!r} among its device properties; read it "
            f"with getattr(properties, {name!r}, None), or run this on a real card"
        )

    def __repr__(self) -> str:
        return (
            f"_CudaDeviceProperties(name='{self.name}', major={self.major}, "
            f"minor={self.minor}, total_memory={self.total_memory // _MIB}MB, "
            f"multi_processor_count={self.multi_processor_count}, uuid={self.uuid}, "
            f"pci_bus_id={self.pci_bus_id}, pci_device_id={self.pci_device_id}, "
            f"pci_domain_id={self.pci_domain_id}, "
            f"L2_cache_size={self.L2_cache_size // _MIB}MB)"
        )
