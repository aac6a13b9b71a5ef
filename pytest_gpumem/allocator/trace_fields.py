"""Reads the parts of a trace file; each error describes the problem in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pytest_gpumem.errors import TraceError

#: The columns of a trace, and the statistic in each column.
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
#: The largest ``int64_t``.
_MOST: Final = 2**63 - 1
#: The name of each type in an error message about a value of the wrong type.
_NAMES = {
    bool: "true or false",
    dict: "object",
    float: "number",
    int: "integer",
    list: "list",
    str: "string",
}


def no_trace(problem: str) -> TraceError:
    """Return the error that describes a problem of a trace."""
    return TraceError(f"not a trace that can be replayed: {problem}")


def read_field(
    mapping: Any, key: str, kinds: type | tuple[type, ...], where: str
) -> Any:
    """Return an entry of an object in a trace.

    Args:
        mapping: The object, as JSON gave it.
        key: The entry's key.
        kinds: The allowed type or types; true and false do not count as integers.
        where: The object's name in messages.

    Raises:
        TraceError: The entry is missing or has another type.
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
    """Return an entry that is an integer of at least 0, as large as C++ can have it.

    Raises:
        TraceError: The entry is missing or is not such an integer.
    """
    value: int = read_field(mapping, key, int, where)
    if abs(value) > _MOST:  # Python may refuse to write it
        raise no_trace(f"{where}: {key} has more than 63 bits")
    if value < 0:
        raise no_trace(f"{where}: {key}={value} is below 0")
    return value
