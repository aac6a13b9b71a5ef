"""Reads the parts of a trace file; an error says in one sentence what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pytest_gpumem.errors import TraceError

#: A trace's columns and the statistic each one shows.
STATS: Final = {
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
#: How a type is called where a value is of another one.
_NAMES = {
    bool: "true or false",
    dict: "object",
    float: "number",
    int: "integer",
    list: "list",
    str: "string",
}


def no_trace(problem: str) -> TraceError:
    """Return the error for a trace that has this problem."""
    return TraceError(f"not a trace that can be replayed: {problem}")


def read_field(
    mapping: Any, key: str, kinds: type | tuple[type, ...], where: str
) -> Any:
    """Return an entry of an object in a trace.

    Args:
        mapping: The object, as JSON gave it.
        key: The entry's key.
        kinds: The type it must have, or the types; true and false are no integers.
        where: The object's name in messages.

    Raises:
        TraceError: There is no such entry, or it is of another type.
    """
    if not isinstance(mapping, Mapping):
        raise no_trace(f"{where} is {mapping!r:.60}, not an object")
    if key not in mapping:
        raise no_trace(f"{where} lacks {key!r}")
    value = mapping[key]
    accepted = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, accepted) or (
        isinstance(value, bool) and bool not in accepted
    ):
        names = " or ".join(_NAMES[kind] for kind in accepted)
        raise no_trace(f"{where}: {key}={value!r:.60}, accepted is: {names}")
    return value


def read_size(mapping: Any, key: str, where: str) -> int:
    """Return an entry that is an integer of at least 0.

    Raises:
        TraceError: There is no such entry, or it is something else.
    """
    value: int = read_field(mapping, key, int, where)
    if value < 0:
        raise no_trace(f"{where}: {key}={value} is below 0")
    return value
