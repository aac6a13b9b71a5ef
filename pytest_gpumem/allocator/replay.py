"""Replays a recorded trace of allocations on the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.allocator.caching import CachingAllocator, OutOfMemory
from pytest_gpumem.allocator.config import AllocatorConfig
from pytest_gpumem.allocator.driver import Driver
from pytest_gpumem.allocator.oom_text import ProcessMemory
from pytest_gpumem.allocator.trace_fields import STATS, no_trace, read_field, read_size
from pytest_gpumem.allocator.versions import version_of
from pytest_gpumem.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_gpumem.allocator.blocks import Block

_LETTERS: Final = {
    "active_allocated": "A",
    "active_pending_free": "P",
    "inactive": "f",
}


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The results of the model for a trace.

    Attributes:
        fields: Names of the columns.
        rows: The state after each event, one row per event.
        oom: Message of the error, by the index of the event that raised it.
        driver: Driver calls, by the index of the event that made them.
        snapshots: Segments, for each event that has a snapshot in the trace.
    """

    fields: list[str]
    rows: list[list[int | None]]
    oom: dict[str, str]
    driver: dict[str, list[list[Any]]]
    snapshots: dict[str, list[Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return rows and errors in the format of a trace."""
        return {"rows": self.rows, "oom": self.oom}


def replay(trace: Mapping[str, Any]) -> ReplayResult:
    """Run a trace's events on a fresh allocator.

    Args:
        trace: ``meta`` (``total_bytes`` or ``total``, ``ctx``, ``conf``, ``addr``,
            ``streams``), ``fields`` and ``events``. If it has ``snapshots``, the result
            has snapshots for the same events.

    Raises:
        TraceError: The trace is incomplete, or an event is not possible.
    """
    return _Run(trace).finish()


def _block(block: Mapping[str, Any]) -> list[Any]:
    """Return a snapshot's block in the format of a trace.

    A free block has 0 requested bytes there.
    """
    letter = _LETTERS[block["state"]]
    requested = 0 if letter == "f" else block["requested_size"]
    return [block["size"], letter, requested]


class _Run:
    """One replay: the allocator, and the blocks by their ids in the trace."""

    def __init__(self, trace: Mapping[str, Any]) -> None:
        meta = read_field(trace, "meta", dict, "the trace")
        total = "total" if "total_bytes" not in meta else "total_bytes"
        self._events = read_field(trace, "events", list, "the trace")
        self._fields = read_field(trace, "fields", list, "the trace")
        self._snapshot_keys = (
            read_field(trace, "snapshots", dict, "the trace")
            if "snapshots" in trace
            else {}
        )
        conf = read_field(meta, "conf", str, "'meta'")
        torch = read_field(meta, "torch", str, "'meta'") if "torch" in meta else ""
        address_policy = read_field(meta, "addr", str, "'meta'")
        try:
            self._driver = Driver(
                read_size(meta, total, "'meta'"),
                other_bytes=read_size(meta, "ctx", "'meta'"),
                address_policy=address_policy,
            )
            config = AllocatorConfig.parse(conf, version_of(torch))
        except TraceError:
            raise
        except ValueError as error:
            raise no_trace(f"'meta': {error}") from error
        context = self._driver.other_bytes
        self._allocator = CachingAllocator(
            self._driver,
            config=config,
            processes=lambda: [ProcessMemory(None, self._driver.used_bytes + context)],
        )
        streams = read_field(meta, "streams", dict, "'meta'")
        self._streams = {key: read_size(streams, key, "'streams'") for key in streams}
        self._blocks: dict[Any, Block | None] = {}
        self._address: int | None = None
        self._oom: dict[str, str] = {}
        for name in self._fields:
            if name not in (*STATS, "oom", "ptr"):
                raise no_trace(f"unknown column in 'fields': {name!r}")

    def finish(self) -> ReplayResult:
        rows = []
        driver: dict[str, list[list[Any]]] = {}
        snapshots = {}
        for index, event in enumerate(self._events):
            key = str(index)
            calls: list[tuple[str, int, int, int | None]] = []
            self._driver.calls = calls
            self._step(key, event)
            if calls:
                driver[key] = [list(call) for call in calls]
            rows.append(self._row(key))
            if key in self._snapshot_keys:
                snapshots[key] = self._snapshot()
        return ReplayResult(self._fields, rows, self._oom, driver, snapshots)

    def _step(self, index: str, event: Mapping[str, Any]) -> None:
        where = f"event {index}"
        allocator = self._allocator
        self._address = None
        kind = read_field(event, "op", str, where)
        if kind == "alloc":
            self._alloc(index, event)
        elif kind == "free":
            block = self._block(event, where)
            del self._blocks[event["id"]]
            if block is not None:
                allocator.free(block)
        elif kind == "record_stream":
            block = self._block(event, where)
            stream = self._stream(event, where)
            if block is not None:
                allocator.record_stream(block, stream)
        elif kind == "empty_cache":
            allocator.empty_cache()
        elif kind == "reset_peak":
            allocator.reset_peak_stats()
        else:
            self._set(kind, event, where)

    def _set(self, kind: str, event: Mapping[str, Any], where: str) -> None:
        if kind == "set_fraction":
            fraction = read_field(event, "fraction", (int, float), where)
            try:
                self._allocator.set_memory_fraction(fraction)
            except ValueError as error:
                raise no_trace(f"{where}: {error}") from error
        elif kind == "events_pending":
            pending = read_field(event, "value", (int, bool), where)
            self._allocator.events_pending = bool(pending)
        elif kind == "set_ctx":
            self._driver.other_bytes = read_size(event, "bytes", where)
        else:
            raise no_trace(f"{where}: unknown op {kind!r}")

    def _stream(self, event: Mapping[str, Any], where: str) -> int:
        number = read_size(event, "stream", where)
        if str(number) not in self._streams:
            raise no_trace(f"{where}: stream {number} is not in 'streams' of 'meta'")
        return self._streams[str(number)]

    def _block(self, event: Mapping[str, Any], where: str) -> Block | None:
        name = read_field(event, "id", (int, str), where)
        if name not in self._blocks:
            raise no_trace(f"{where}: id {name!r} is not alive")
        return self._blocks[name]

    def _alloc(self, index: str, event: Mapping[str, Any]) -> None:
        where = f"event {index}"
        name = read_field(event, "id", (int, str), where)
        nbytes = read_size(event, "bytes", where)
        stream = self._stream(event, where)
        if name in self._blocks:
            raise no_trace(f"{where}: id {name!r} is alive already")
        self._blocks[name] = None
        if not nbytes:
            return  # torch returns a null pointer and counts nothing
        try:
            block = self._allocator.malloc(nbytes, stream)
        except OutOfMemory as error:
            self._oom[index] = error.message
        else:
            self._blocks[name] = block
            self._address = block.address

    def _row(self, index: str) -> list[int | None]:
        stats = self._allocator.memory_stats()
        special = {"oom": int(index in self._oom), "ptr": self._address}
        return [
            special[name] if name in special else stats[STATS[name]]
            for name in self._fields
        ]

    def _snapshot(self) -> list[Any]:
        return [
            [
                segment["address"],
                segment["total_size"],
                segment["stream"],
                segment["segment_type"],
                int(segment["is_expandable"]),
                [_block(block) for block in segment["blocks"]],
            ]
            for segment in self._allocator.snapshot()
        ]


__all__ = ["ReplayResult", "replay"]
