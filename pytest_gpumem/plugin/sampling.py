"""NVML beside a test's phases: sampled where somebody wants to know, or why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pytest_gpumem.plugin.record import record_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from pytest_gpumem.devices import Device, Tracker
    from pytest_gpumem.plugin import marks
    from pytest_gpumem.plugin.settings import Settings
    from pytest_gpumem.records.memory import MemoryFigures

_AT_THE_TIME: Final = "NVML could not tell at the time"


def is_wanted(settings: Settings, wishes: marks.Wishes | None) -> bool:
    """Tell whether a limit or a report needs what NVML counts."""
    limits = () if wishes is None else wishes.limits
    return bool(settings.reports) or any(each.metric == "process" for each in limits)


def with_samples(device: Device, trackers: list[Tracker]) -> list[Tracker]:
    """Return the trackers, with NVML sampled until they are closed."""
    from pytest_gpumem.instruments.sampler import sampled  # noqa: PLC0415  # torch is here

    return sampled(device, trackers)


def why_unknown(device: Device, index: int) -> str:
    """Return why this process's bytes on a card are not known."""
    return device.counted(index).why or _AT_THE_TIME


def note_unknown(
    item: pytest.Item, device: Device, figures: Iterable[MemoryFigures]
) -> None:
    """Put into a test's record why its process bytes are not known, if so."""
    for each in figures:
        if each.peak_process_bytes is None:
            text = f"process bytes unknown: {why_unknown(device, each.device_index)}"
            record = record_of(item)
            if text not in (record.unknown or ""):
                record.unknown = "; ".join(filter(None, (record.unknown, text)))
