"""Describes the moment at which memory runs out, before the error is raised."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import torch

from pytest_gpumem.devices.nvml import other_processes
from pytest_gpumem.instruments.live_tensors import Survey, survey
from pytest_gpumem.instruments.module_parts import unseen
from pytest_gpumem.instruments.sites import current_phase, describe_site
from pytest_gpumem.records.incidents import Incident, Process
from pytest_gpumem.stacks import calling_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from pytest_gpumem.devices import Device

#: The number of incidents of one test that are described in full. For later ones only the
#: figures and the site are kept.
CLOSELY: Final = 8
_failed = threading.local()
_witnesses: Final[list[OomWitness]] = []


class OomWitness:
    """Notes every allocation that fails, and every moment that ``note`` is called for.

    Only plain numbers and words are kept, so that no tensor stays alive for it. Nothing is
    examined until memory runs out. ``also`` is called with each incident when it happens.

    Attributes:
        incidents: The incidents, oldest first.
    """

    def __init__(
        self,
        device: Device,
        *,
        also: Callable[[Incident], object] | None = None,
    ) -> None:
        self._device = device
        self._also = also
        self._stack = ExitStack()
        self._is_busy = threading.local()
        self._pauses = 0
        self.incidents: list[Incident] = []

    def clear(self) -> None:
        """Forget all incidents."""
        failing_rule()
        self.incidents = []

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing for a block."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def __enter__(self) -> OomWitness:  # noqa: PYI034  # Self needs Python 3.11
        self._stack.enter_context(self._device.observing_ooms(self._failed))
        _witnesses.append(self)
        return self

    def __exit__(self, *_error: object) -> None:
        _witnesses.remove(self)
        self._stack.close()

    def _failed(self, index: int, nbytes: int) -> None:
        self.note(index, nbytes, calling_frame(), injected_by=failing_rule())

    def note(
        self,
        index: int,
        nbytes: int,
        frame: FrameType,
        *,
        injected_by: str | None = None,
        limit: str = "",
    ) -> None:
        """Describe this moment.

        ``frame`` is the innermost frame of the code that requested memory. ``limit``
        describes the broken limit; it is empty for an OOM.
        """
        if self._pauses or getattr(self._is_busy, "now", False):
            return  # the description itself may run out of memory
        self._is_busy.now = True
        try:
            incident = self._describe(index, nbytes, frame, injected_by, limit)
            self.incidents.append(incident)
            if self._also is not None:
                self._also(incident)
        finally:
            self._is_busy.now = False

    def _describe(
        self,
        index: int,
        nbytes: int,
        frame: FrameType,
        injected_by: str | None,
        limit: str,
    ) -> Incident:
        device = self._device
        stats = device.memory_stats(index)
        free, total = device.mem_get_info(index)
        reserved = stats.get("reserved_bytes.all.current", 0)
        share = torch.cuda.get_per_process_memory_fraction(index)  # set by user code
        room = min(reserved + free, int(total * share))
        found, note = Survey((), 0, 0, (), 0), ""
        largest = 0
        processes: tuple[Process, ...] = ()
        if len(self.incidents) < CLOSELY:
            try:
                with unseen():
                    found = survey(device, index, frame)
                largest = _largest_free(device, index)
                if device.kind == "cuda":
                    processes = other_processes(index)
            except Exception as error:  # noqa: BLE001  # the description must not change the program
                note = f"what is live could not be looked at: {error!r}"
        else:
            note = f"only the first {CLOSELY} OOMs or broken limits of a test are examined closely"
        return Incident(
            kind="limit" if limit else "oom",
            device_index=index,
            card=device.name(index),
            total_bytes=total,
            budget_bytes=device.budget(index),
            room_bytes=room,
            allocated_bytes=stats.get("allocated_bytes.all.current", 0),
            reserved_bytes=reserved,
            largest_free_bytes=largest,
            nbytes=nbytes,
            site=describe_site(frame, exact=True),
            phase=current_phase(frame),
            injected_by=injected_by,
            limit=limit,
            processes=processes,
            note=note,
            **found._asdict(),
        )


def note_cause(rule: str) -> None:
    """Note the rule that causes the thread's next failure."""
    if _witnesses:
        _failed.rule = rule


def failing_rule() -> str | None:
    """Return and forget the rule that caused this thread's failure; None without one."""
    rule: str | None = getattr(_failed, "rule", None)
    _failed.rule = None
    return rule


def tell_failed(index: int, nbytes: int, *, is_oom: bool) -> None:
    """Tell the witnesses of a failure that does not come from the allocator."""
    rule = failing_rule()
    if rule is None or not is_oom:
        return  # the allocator's observers report it, or it is not an OOM
    frame = calling_frame()
    for witness in _witnesses:
        witness.note(index, nbytes, frame, injected_by=rule)


def _largest_free(device: Device, index: int) -> int:
    blocks = (each for segment in device.segments(index) for each in segment["blocks"])
    free = (each["size"] for each in blocks if each["state"] == "inactive")
    return max(free, default=0)
