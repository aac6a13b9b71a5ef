"""Replay a recorded trace of allocations on the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import TraceError
from pytest_gpumem.model.allocator import CachingAllocator, OutOfMemory
from pytest_gpumem.model.config import AllocatorConfig
from pytest_gpumem.model.driver import Driver
from pytest_gpumem.model.snapshot import snapshot, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_gpumem.model.blocks import Block

#: A trace's columns and the statistic each one shows.
_STATS: Final = {
    "allocated": "allocated_bytes.all.current",
    "reserved": "reserved_bytes.all.current",
    "active": "active_bytes.all.current",
    "inactive_split": "inactive_split_bytes.all.current",
    "requested": "requested_bytes.all.current",
    "peak_allocated": "allocated_bytes.all.peak",
    "peak_reserved": "reserved_bytes.all.peak",
    "peak_active": "active_bytes.all.peak",
    "peak_inactive_split": "inactive_split_bytes.all.peak",
    "peak_requested": "requested_bytes.all.peak",
    "allocated_small": "allocated_bytes.small_pool.current",
    "allocated_large": "allocated_bytes.large_pool.current",
    "reserved_small": "reserved_bytes.small_pool.current",
    "reserved_large": "reserved_bytes.large_pool.current",
    "inactive_split_small": "inactive_split_bytes.small_pool.current",
    "inactive_split_large": "inactive_split_bytes.large_pool.current",
    "n_alloc": "allocation.all.current",
    "n_segment": "segment.all.current",
    "n_segment_small": "segment.small_pool.current",
    "n_active": "active.all.current",
    "n_inactive_split": "inactive_split.all.current",
    "n_oversize_segments": "oversize_segments.current",
    "n_oversize_allocations": "oversize_allocations.current",
    "num_alloc_retries": "num_alloc_retries",
    "num_ooms": "num_ooms",
    "num_device_alloc": "num_device_alloc",
    "num_device_free": "num_device_free",
}
_LETTERS: Final = {
    "active_allocated": "A",
    "active_pending_free": "P",
    "inactive": "f",
}


@dataclass(frozen=True, slots=True)
class Replay:
    """What the model answered to a trace.

    Attributes:
        fields: The columns.
        rows: One row for each event, the state after it.
        oom: Text of the error, by index of the event that raised it.
        driver: Driver calls, by index of the event that made them.
        snapshots: Segments, for the events that the trace has a snapshot of.
    """

    fields: list[str]
    rows: list[list[int | None]]
    oom: dict[str, str]
    driver: dict[str, list[list[Any]]]
    snapshots: dict[str, list[Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return rows and errors in the trace's own format."""
        return {"rows": self.rows, "oom": self.oom}


def replay(trace: Mapping[str, Any]) -> Replay:
    """Run a trace's events on a fresh allocator.

    Args:
        trace: ``meta`` (``total_bytes``, ``ctx``, ``conf``, ``addr``, ``streams``),
            ``events``, ``fields``.

    Raises:
        TraceError: The trace lacks something, or an event makes no sense.
    """
    try:
        return _Run(trace).finish()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(
            f"not a trace that can be replayed: {type(error).__name__}: {error}; "
            "expected are 'meta', 'fields' and 'events' as in tests/recordings/traces"
        ) from error


class _Run:
    """One replay: the allocator and the blocks by the trace's ids."""

    def __init__(self, trace: Mapping[str, Any]) -> None:
        self._trace = trace
        meta = trace["meta"]
        self._driver = Driver(
            meta["total_bytes"], other_bytes=meta["ctx"], address_policy=meta["addr"]
        )
        self._driver.calls = []
        self._allocator = CachingAllocator(
            self._driver, config=AllocatorConfig.parse(meta["conf"])
        )
        self._streams = {int(key): value for key, value in meta["streams"].items()}
        self._blocks: dict[int, Block | None] = {}
        self._address: int | None = None
        self._oom: dict[str, str] = {}
        unknown = set(trace["fields"]) - {*_STATS, "oom", "ptr"}
        if unknown:
            raise TraceError(f"unknown columns in 'fields': {sorted(unknown)}")

    def finish(self) -> Replay:
        rows = []
        driver: dict[str, list[list[Any]]] = {}
        snapshots = {}
        wanted = self._trace.get("snapshots", {})
        for index, event in enumerate(self._trace["events"]):
            self._driver.calls = []
            self._step(str(index), event)
            if self._driver.calls:
                driver[str(index)] = [list(call) for call in self._driver.calls]
            rows.append(self._row(str(index)))
            if str(index) in wanted:
                snapshots[str(index)] = self._snapshot()
        return Replay(list(self._trace["fields"]), rows, self._oom, driver, snapshots)

    def _step(  # noqa: C901  # a list of operations
        self, index: str, event: Mapping[str, Any]
    ) -> None:
        allocator = self._allocator
        self._address = None
        kind = event["op"]
        if kind == "alloc":
            self._alloc(index, event)
        elif kind == "free":
            block = self._blocks.pop(event["id"])
            if block is not None:
                allocator.free(block)
        elif kind == "empty_cache":
            allocator.empty_cache()
        elif kind == "reset_peak":
            allocator.reset_peak_stats()
        elif kind == "set_fraction":
            allocator.set_memory_fraction(event["fraction"])
        elif kind == "record_stream":
            block = self._blocks[event["id"]]
            if block is not None:
                allocator.record_stream(block, self._stream(event["stream"]))
        elif kind == "events_pending":
            allocator.events_pending = bool(event["value"])
        elif kind == "set_ctx":
            self._driver.other_bytes = event["bytes"]
        else:
            raise TraceError(f"event {index}: unknown op {kind!r}")

    def _stream(self, number: int) -> int:
        handle: int = self._streams[number]
        return handle

    def _alloc(self, index: str, event: Mapping[str, Any]) -> None:
        nbytes = event["bytes"]
        if not isinstance(nbytes, int) or nbytes < 0:
            raise TraceError(f"event {index}: bytes={nbytes!r} is no size")
        if event["id"] in self._blocks:
            raise TraceError(f"event {index}: id {event['id']!r} is alive already")
        self._blocks[event["id"]] = None
        if not nbytes:
            return
        try:
            block = self._allocator.malloc(nbytes, self._stream(event["stream"]))
        except OutOfMemory as error:
            self._oom[index] = error.message
        else:
            self._blocks[event["id"]] = block
            self._address = block.address

    def _row(self, index: str) -> list[int | None]:
        stats = self._allocator.memory_stats()
        special = {"oom": int(index in self._oom), "ptr": self._address}
        return [
            special[name] if name in special else stats[_STATS[name]]
            for name in self._trace["fields"]
        ]

    def _snapshot(self) -> list[Any]:
        return [
            [
                segment["address"],
                segment["total_size"],
                segment["stream"],
                segment["segment_type"],
                int(segment["is_expandable"]),
                [
                    [block["size"], _LETTERS[block["state"]], block["requested_size"]]
                    for block in segment["blocks"]
                ],
            ]
            for segment in snapshot(self._allocator)
        ]


__all__ = ["Replay", "replay", "state_of"]
