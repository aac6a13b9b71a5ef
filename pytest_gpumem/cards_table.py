"""The table of real cards, with the source of each figure.

Totals are those that the driver reports to CUDA (``cudaMemGetInfo``, torch's
``total_memory``); they are smaller than the manufacturer's figures. For the same card
they differ by up to 5 % between drivers and systems: ``source`` says where a total was
read, and docs/cards.md lists totals that others saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_KIB: Final = 2**10
_MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class MultiprocessorLimits:
    """The properties of a multiprocessor that its compute capability fixes; in bytes."""

    max_threads: int
    registers: int
    shared_memory: int
    shared_memory_of_block: int


#: By compute capability; a capability that is not listed has those of the next lower one.
#: Source: CUDA C++ Programming Guide, "Technical Specifications per Compute
#: Capability".
LIMITS: Final[dict[tuple[int, int], MultiprocessorLimits]] = {
    (3, 7): MultiprocessorLimits(2048, 131072, 112 * _KIB, 48 * _KIB),
    (6, 0): MultiprocessorLimits(2048, 65536, 64 * _KIB, 48 * _KIB),
    (7, 0): MultiprocessorLimits(2048, 65536, 96 * _KIB, 96 * _KIB),
    (7, 5): MultiprocessorLimits(1024, 65536, 64 * _KIB, 64 * _KIB),
    (8, 0): MultiprocessorLimits(2048, 65536, 164 * _KIB, 163 * _KIB),
    (8, 6): MultiprocessorLimits(1536, 65536, 100 * _KIB, 99 * _KIB),
    (8, 7): MultiprocessorLimits(1536, 65536, 164 * _KIB, 163 * _KIB),
    (8, 9): MultiprocessorLimits(1536, 65536, 100 * _KIB, 99 * _KIB),
    (9, 0): MultiprocessorLimits(2048, 65536, 228 * _KIB, 227 * _KIB),
    (10, 0): MultiprocessorLimits(2048, 65536, 228 * _KIB, 227 * _KIB),
    (11, 0): MultiprocessorLimits(1536, 65536, 228 * _KIB, 227 * _KIB),
    (12, 0): MultiprocessorLimits(1536, 65536, 100 * _KIB, 99 * _KIB),
}


@dataclass(frozen=True, slots=True)
class Card:
    """A card as the CUDA runtime describes it.

    Attributes:
        name: The name that the driver and ``torch.cuda.get_device_name`` give.
        total_bytes: The total memory that the driver reports.
        compute_capability: Major and minor number.
        multi_processor_count: The number of streaming multiprocessors.
        l2_cache_size: The size of the L2 cache in bytes.
        given_context_bytes: The bytes of a process's context, if they are known or were
            given; None means that they are modelled.
        nccl_bytes: The bytes that a communicator of NCCL takes outside PyTorch's
            allocator; 0 unless they were given.
        precision_bytes: How exactly ``total_bytes`` is known; 1 means to the byte.
        source: Where ``total_bytes`` was read.
        is_integrated: Whether the card has no memory of its own and uses the host's.
        host_bytes: For an integrated card, the bytes that the host holds of the shared
            memory; None means the bytes that the process holds.
        nvml_name: The name that NVML gives, if it differs from CUDA's. Only a Jetson Orin
            has such a name, and NVML lists no processes on it.
        parent: For a slice (MIG), the table's name of the whole card.
        profile: For a slice (MIG), its profile, such as ``1g.10gb``.
    """

    name: str
    total_bytes: int
    compute_capability: tuple[int, int]
    multi_processor_count: int
    l2_cache_size: int = 4 * _MIB
    given_context_bytes: int | None = None
    nccl_bytes: int = 0
    precision_bytes: int = 1
    source: str = "made up"
    is_integrated: bool = False
    host_bytes: int | None = None
    nvml_name: str = ""
    parent: str = ""
    profile: str = ""

    @property
    def context_bytes(self) -> int:
        """The bytes of a process's context; they are modelled unless they were given.

        Source: a fit to the bytes that OOM texts of 21 kinds of cards count outside
        PyTorch; the median error is 5 %, the worst 21 %. The driver keeps local memory for
        every thread that can run at the same time.
        """
        if self.given_context_bytes is not None:
            return self.given_context_bytes
        threads = self.multi_processor_count * self.max_threads_per_multi_processor
        return round(36 + 2.18 * threads / 1024) * _MIB

    @property
    def _limits(self) -> MultiprocessorLimits:
        known = [cc for cc in LIMITS if cc <= self.compute_capability]
        return LIMITS[max(known, default=min(LIMITS))]

    @property
    def max_threads_per_multi_processor(self) -> int:
        """The most threads of a multiprocessor."""
        return self._limits.max_threads

    @property
    def regs_per_multiprocessor(self) -> int:
        """The number of 32-bit registers of a multiprocessor."""
        return self._limits.registers

    @property
    def shared_memory_per_block(self) -> int:
        """The bytes of a block without a special request: 48 KiB on every card."""
        return 48 * _KIB

    @property
    def shared_memory_per_block_optin(self) -> int:
        """The most bytes that a block may request."""
        return self._limits.shared_memory_of_block

    @property
    def shared_memory_per_multiprocessor(self) -> int:
        """The bytes of shared memory of a multiprocessor."""
        return self._limits.shared_memory


def _device_query(driver: str) -> str:
    return f"deviceQuery output in a public repository, driver for CUDA {driver}"


def _properties(version: str) -> str:
    return f"torch's device properties in a public repository, {version}; whole MiB"


def _text(
    name: str, total_gib: float, capability: tuple[int, int], sms: int, l2_mib: int
) -> Card:
    """Return a card whose total is known from an OOM text, to 0.01 GiB."""
    return Card(
        name,
        round(total_gib * 2**30),
        capability,
        sms,
        l2_mib * _MIB,
        precision_bytes=round(0.01 * 2**30),
        source="an OOM text in a public issue; 0.01 GiB",
    )


def _whole(
    name: str, total_mib: int, capability: tuple[int, int], sms: int, l2_mib: int
) -> Card:
    """Return a card whose total is known in whole MiB."""
    return Card(
        name,
        total_mib * _MIB,
        capability,
        sms,
        l2_mib * _MIB,
        precision_bytes=_MIB,
        source="a tool's output in a public repository; whole MiB",
    )


def _orin(total_bytes: int, sms: int, l2_mib: int, driver: str) -> Card:
    """Return a module of the Jetson Orin family; CUDA has one name for all of them."""
    return Card(
        "Orin",
        total_bytes,
        (8, 7),
        sms,
        l2_mib * _MIB,
        source=_device_query(driver),
        is_integrated=True,
        nvml_name="Orin (nvgpu)",
    )


#: Cards by the name that people use. Multiprocessors and caches that no output shows
#: are those of NVIDIA's specifications.
CARDS: Final[dict[str, Card]] = {
    "K80": Card(
        "Tesla K80", 11996954624, (3, 7), 13, 1572864, source=_device_query("10.2")
    ),
    "P100": Card(
        "Tesla P100-PCIE-16GB",
        17071734784,
        (6, 0),
        56,
        4194304,
        source=_device_query("11.4"),
    ),
    "V100-16GB": Card(
        "Tesla V100-SXM2-16GB",
        16928342016,
        (7, 0),
        80,
        6291456,
        source=_device_query("12.4"),
    ),
    "V100-32GB": Card(
        "Tesla V100-SXM2-32GB",
        34089730048,
        (7, 0),
        80,
        6291456,
        source=_device_query("11.4"),
    ),
    "T4": Card(
        "Tesla T4", 15642329088, (7, 5), 40, 4194304, source=_device_query("12.5")
    ),
    "RTX-2080-Ti": Card(
        "NVIDIA GeForce RTX 2080 Ti",
        11523260416,
        (7, 5),
        68,
        5767168,
        source=_device_query("10.1"),
    ),
    "A100-40GB": Card(
        "NVIDIA A100-SXM4-40GB",
        42298834944,
        (8, 0),
        108,
        41943040,
        source=_device_query("12.2"),
    ),
    "A100-80GB": Card(
        "NVIDIA A100-SXM4-80GB",
        85100068864,
        (8, 0),
        108,
        41943040,
        source=_device_query("12.5"),
    ),
    "RTX-3060": Card(
        "NVIDIA GeForce RTX 3060",
        12629508096,
        (8, 6),
        28,
        2359296,
        source=_device_query("12.2"),
    ),
    "RTX-3090": Card(
        "NVIDIA GeForce RTX 3090",
        25414860800,
        (8, 6),
        82,
        6291456,
        source=_device_query("12.2"),
    ),
    "A10": Card(
        "NVIDIA A10", 23696375808, (8, 6), 72, 6291456, source=_device_query("12.8")
    ),
    "A10G": Card(
        "NVIDIA A10G",
        22587 * _MIB,
        (8, 6),
        80,
        6291456,
        precision_bytes=_MIB,
        source=_properties("2.15.0.dev+cu130"),
    ),
    "L4": Card(
        "NVIDIA L4", 23612293120, (8, 9), 58, 50331648, source=_device_query("12.0")
    ),
    "L40S": Card(
        "NVIDIA L40S", 47576711168, (8, 9), 142, 100663296, source=_device_query("12.4")
    ),
    "RTX-4090": Card(
        "NVIDIA GeForce RTX 4090",
        25250627584,
        (8, 9),
        128,
        75497472,
        source=_device_query("13.0"),
    ),
    "H100": Card(
        "NVIDIA H100 80GB HBM3",
        85028896768,
        (9, 0),
        132,
        52428800,
        source=_device_query("12.8"),
    ),
    "H200": Card(
        "NVIDIA H200",
        143156 * _MIB,
        (9, 0),
        132,
        62914560,
        precision_bytes=_MIB,
        source=_properties("version not given"),
    ),
    "B200": Card(
        "NVIDIA B200",
        182642 * _MIB,
        (10, 0),
        148,
        132644864,
        precision_bytes=_MIB,
        source=_properties("version not given"),
    ),
    "RTX-5090": Card(
        "NVIDIA GeForce RTX 5090",
        33677180928,
        (12, 0),
        170,
        100663296,
        source=_device_query("12.8"),
    ),
    "RTX-3070": Card(
        "NVIDIA GeForce RTX 3070",
        8232435712,
        (8, 6),
        46,
        4194304,
        source=_device_query("12.8"),
    ),
    "RTX-3070-Ti-Laptop": Card(
        "NVIDIA GeForce RTX 3070 Ti Laptop GPU",
        8232435712,
        (8, 6),
        46,
        4194304,
        source=_device_query("12.8"),
    ),
    "RTX-3080": Card(
        "NVIDIA GeForce RTX 3080",
        10472390656,
        (8, 6),
        68,
        5242880,
        source=_device_query("12.0"),
    ),
    "RTX-3080-Laptop": _text(
        "NVIDIA GeForce RTX 3080 Laptop GPU", 15.73, (8, 6), 48, 4
    ),
    "RTX-3090-Ti": _whole("NVIDIA GeForce RTX 3090 Ti", 24114, (8, 6), 84, 6),
    "RTX-A2000": _text("NVIDIA RTX A2000 12GB", 11.53, (8, 6), 26, 3),
    "RTX-A4000": _text("NVIDIA RTX A4000", 15.61, (8, 6), 48, 4),
    "RTX-A5000": Card(
        "NVIDIA RTX A5000",
        25402343424,
        (8, 6),
        64,
        6291456,
        source="a program's output in a public repository, driver not given",
    ),
    "RTX-A6000": Card(
        "NVIDIA RTX A6000",
        51160023040,
        (8, 6),
        84,
        6291456,
        source=_device_query("12.7"),
    ),
    "A40": Card(
        "NVIDIA A40", 47608692736, (8, 6), 84, 6291456, source=_device_query("12.4")
    ),
    "RTX-4070-Ti": _text("NVIDIA GeForce RTX 4070 Ti", 11.70, (8, 9), 60, 48),
    "RTX-4070-Ti-SUPER": _whole(
        "NVIDIA GeForce RTX 4070 Ti SUPER", 15974, (8, 9), 66, 48
    ),
    "RTX-4080": _whole("NVIDIA GeForce RTX 4080", 16049, (8, 9), 76, 64),
    "RTX-4080-SUPER": Card(
        "NVIDIA GeForce RTX 4080 SUPER",
        16852844544,
        (8, 9),
        80,
        67108864,
        source=_device_query("12.4"),
    ),
    "L40": _text("NVIDIA L40", 44.40, (8, 9), 142, 96),
    "RTX-6000-Ada": _text("NVIDIA RTX 6000 Ada Generation", 44.43, (8, 9), 142, 96),
    "H100-PCIe": _whole("NVIDIA H100 PCIe", 81008, (9, 0), 114, 50),
    "H100-NVL": _text("NVIDIA H100 NVL", 93.10, (9, 0), 132, 60),
    "GH200-120GB": Card(
        "NVIDIA GH200 120GB",
        101468602368,
        (9, 0),
        132,
        62914560,
        source=_device_query("12.9"),
    ),
    "GH200-480GB": Card(
        "NVIDIA GH200 480GB",
        102005473280,
        (9, 0),
        132,
        62914560,
        source=_device_query("12.2"),
    ),
    "RTX-5060-Ti": _whole("NVIDIA GeForce RTX 5060 Ti", 15841, (12, 0), 36, 32),
    "RTX-5080": _text("NVIDIA GeForce RTX 5080", 15.48, (12, 0), 84, 64),
    "RTX-PRO-4500": Card(
        "NVIDIA RTX PRO 4500 Blackwell",
        33689829376,
        (12, 0),
        82,
        67108864,
        source="a public issue, driver 595.91",
    ),
    "RTX-PRO-6000": _whole(
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97250, (12, 0), 188, 128
    ),
    "GB10": Card(
        "NVIDIA GB10",
        130602405888,
        (12, 1),
        48,
        25165824,
        source="a program's output in a public repository, driver for CUDA 13.0",
        is_integrated=True,
    ),
    "Jetson-Thor": Card(
        "NVIDIA Thor",
        131881680896,
        (11, 0),
        20,
        33554432,
        source=_device_query("13.0"),
        is_integrated=True,
    ),
    "Jetson-AGX-Orin-64GB": _orin(65893269504, 16, 4, "12.6"),
    "Jetson-Orin-NX-16GB": _orin(16136011776, 8, 2, "11.4"),
    "Jetson-Orin-Nano-8GB": _orin(7987728384, 8, 2, "12.6"),
}


def _slice(parent: str, profile: str, total_mib: int, sms: int) -> Card:
    """Return a slice of a card, whose total is known from ``nvidia-smi``."""
    whole = CARDS[parent]
    share = memory_slices(whole, total_mib * _MIB)
    return Card(
        f"{whole.name} MIG {profile}",
        total_mib * _MIB,
        whole.compute_capability,
        sms,
        whole.l2_cache_size * share // SLICES_OF_MEMORY,
        precision_bytes=_MIB,
        source="nvidia-smi's output in a public repository; whole MiB",
        parent=parent,
        profile=profile,
    )


def memory_slices(whole: Card, total_bytes: int) -> int:
    """Return how many of a card's eight slices of memory a part of it has.

    A part is a little smaller than its share of the memory.
    """
    for count in (1, 2, 4):
        if total_bytes <= whole.total_bytes * count / SLICES_OF_MEMORY:
            return count
    return SLICES_OF_MEMORY


#: A card in MIG mode is divided into these many slices. Source: NVIDIA Multi-Instance
#: GPU User Guide, "Supported MIG Profiles".
SLICES_OF_MEMORY: Final = 8
SLICES_OF_COMPUTE: Final = 7

#: The slices (MIG) by the name that people use. Source of the profiles: NVIDIA
#: Multi-Instance GPU User Guide, "Supported MIG Profiles"; of totals and multiprocessors:
#: ``nvidia-smi mig -lgip``, which prints the total in GiB, with two decimals, and
#: multiples of 64 MiB.
SLICES: Final[dict[str, Card]] = {
    f"{parent}:{profile}": _slice(parent, profile, total_mib, sms)
    for parent, profiles in {
        "A100-40GB": (
            ("1g.5gb", 4864, 14),
            ("1g.10gb", 9856, 14),
            ("2g.10gb", 9856, 28),
            ("3g.20gb", 19968, 42),
            ("4g.20gb", 19968, 56),
            ("7g.40gb", 40192, 98),
        ),
        "A100-80GB": (
            ("1g.10gb", 9728, 14),
            ("1g.20gb", 19968, 14),
            ("2g.20gb", 19968, 28),
            ("3g.40gb", 40192, 42),
            ("4g.40gb", 40448, 56),
            ("7g.80gb", 80640, 98),
        ),
        "H100": (
            ("1g.10gb", 9856, 16),
            ("1g.20gb", 19968, 26),
            ("2g.20gb", 19968, 32),
            ("3g.40gb", 40192, 60),
            ("4g.40gb", 40192, 64),
        ),
        "H200": (
            ("1g.18gb", 16384, 16),
            ("2g.35gb", 33280, 32),
        ),
    }.items()
    for profile, total_mib, sms in profiles
}
