"""The fields that ``--query-gpu`` and ``--query-compute-apps`` name.

Source: ``nvidia-smi --help-query-gpu`` and ``--help-query-compute-apps``: names, their
second spellings, units in the header line, ``[N/A]`` for figures that a card lacks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.nvidia_smi.card_status import CardNow, CardProcess

NOT_KNOWN: Final = "[N/A]"
MIB: Final = 2**20


class Field(NamedTuple):
    """One column.

    Attributes:
        name: The name in the header line.
        read: Returns the value of one row, without its unit.
        unit: The unit, or an empty text.
    """

    name: str
    read: Callable[[CardNow, CardProcess | None], str]
    unit: str = ""


def mib(nbytes: int) -> str:
    """Return bytes as whole MiB, rounded down."""
    return str(nbytes // MIB)


def _gpu(
    name: str, read: Callable[[CardNow], object], unit: str = "", *, also: str = ""
) -> dict[str, Field]:
    field = Field(name, lambda card, _process: str(read(card)), unit)
    return dict.fromkeys((name, *also.split()), field)


def _memory(name: str, read: Callable[[CardNow], int]) -> dict[str, Field]:
    """Return a field of a card's memory, which NVML does not know of an integrated card."""
    return _gpu(
        name,
        lambda card: NOT_KNOWN if card.card.is_integrated else mib(read(card)),
        "MiB",
    )


def _utilization(card: CardNow) -> str:
    """Return the utilization, which NVML does not know of a GPU in MIG mode."""
    return NOT_KNOWN if card.slices or card.card.nvml_name else "0"


def _app(
    name: str, read: Callable[[CardProcess], object], unit: str = "", *, also: str = ""
) -> dict[str, Field]:
    def of_process(_card: CardNow, process: CardProcess | None) -> str:
        return NOT_KNOWN if process is None else str(read(process))

    return dict.fromkeys((name, *also.split()), Field(name, of_process, unit))


def _unknown(names: str, unit: str = "") -> dict[str, Field]:
    return {
        name: Field(name, lambda _card, _process: NOT_KNOWN, unit)
        for name in names.split()
    }


#: Fields without an answer, because a simulated card has no clocks, fans or sensors.
_WITHOUT_ANSWER: Final = (
    _unknown(
        "accounting.mode addressing_mode clocks_event_reasons.active "
        "clocks_throttle_reasons.active compute_mode.current display_attached "
        "ecc.mode.current ecc.mode.pending ecc.errors.corrected.volatile.total "
        "ecc.errors.uncorrected.volatile.total gom.current gpu_reset_status.reset_required "
        "inforom.img pci.sub_device_id "
        "pcie.link.gen.current pcie.link.gen.max pcie.link.width.current "
        "pcie.link.width.max pstate serial gpu_serial vbios_version temperature.gpu "
        "temperature.memory"
    )
    | _unknown("fan.speed", "%")
    | _unknown(
        "power.draw power.draw.average power.draw.instant power.limit "
        "power.default_limit power.max_limit power.min_limit enforced.power.limit",
        "W",
    )
    | _unknown(
        "clocks.current.graphics clocks.current.memory clocks.current.sm clocks.gr "
        "clocks.max.graphics clocks.max.memory clocks.max.sm clocks.mem clocks.sm",
        "MHz",
    )
)


def _of_a_card(driver: str, now: str, count: int) -> dict[str, Field]:
    return (
        _gpu("timestamp", lambda _card: now)
        | _gpu("driver_version", lambda _card: driver)
        | _gpu("count", lambda _card: count)
        | _gpu("name", lambda card: card.name, also="gpu_name")
        | _gpu("uuid", lambda card: card.uuid, also="gpu_uuid")
        | _gpu("pci.bus_id", lambda card: card.bus_id, also="gpu_bus_id")
        | _gpu("pci.bus", lambda card: f"0x{card.gpu.bus:02X}")
        | _gpu("pci.device", lambda _card: "0x00")
        | _gpu("pci.domain", lambda _card: "0x0000")
    )


def fields_of_cards(driver: str, now: str, count: int) -> dict[str, Field]:
    """Return every field of ``--query-gpu``, by each of its spellings.

    Args:
        driver: The driver's version.
        now: The time.
        count: The number of the machine's cards.
    """
    return (
        _WITHOUT_ANSWER
        | _of_a_card(driver, now, count)
        | _gpu("index", lambda card: card.index)
        | _gpu(
            "compute_cap", lambda card: "{}.{}".format(*card.card.compute_capability)
        )
        | _memory("memory.total", lambda card: card.total_bytes)
        | _memory("memory.used", lambda card: card.used_bytes)
        | _memory("memory.free", lambda card: card.free_bytes)
        | _memory("memory.reserved", lambda _card: 0)
        | _gpu("utilization.gpu", _utilization, "%")
        | _gpu("utilization.memory", _utilization, "%")
        | _gpu("mig.mode.current", lambda card: card.mig_mode or NOT_KNOWN)
        | _gpu("mig.mode.pending", lambda card: card.mig_mode or NOT_KNOWN)
        | _gpu("persistence_mode", lambda _card: "Disabled")
        | _gpu("display_active", lambda _card: "Disabled")
        | _gpu("display_mode", lambda _card: "Disabled")
        | _gpu("compute_mode", lambda _card: "Default")
    )


def fields_of_processes(driver: str, now: str, count: int) -> dict[str, Field]:
    """Return every field of ``--query-compute-apps`` by each of its spellings."""
    of_card = _of_a_card(driver, now, count)
    in_front = {
        name: field._replace(name=name if name.startswith("gpu_") else field.name)
        for name, field in of_card.items()
        if name in ("timestamp", "gpu_name", "gpu_uuid", "gpu_bus_id")
    }
    return (
        in_front
        | _unknown("gpu_serial")
        | _app("pid", lambda process: process.pid)
        | _app("process_name", lambda process: process.name, also="name")
        | _app(
            "used_gpu_memory",
            lambda process: mib(process.nbytes),
            "MiB",
            also="used_memory",
        )
    )
