"""Checks whether JSON has the form of a recording."""

from __future__ import annotations

from typing import Any


def find_wrong_part(recorded: Any) -> str | None:
    """Return the part of a recording that is missing or has a wrong type, or None.

    Args:
        recorded: An object of JSON.
    """
    for name in ("card", "versions", "workspace_bytes", "oom_texts"):
        if not isinstance(recorded.get(name), dict):
            return f"{name!r} is not an object"
    for name in ("traces", "phases"):
        if not isinstance(recorded.get(name), list):
            return f"{name!r} is not a list"
    if not isinstance(recorded.get("context_bytes"), int):
        return "'context_bytes' is not an integer"
    if not all(map(_is_trace, recorded["traces"])):
        return "one of 'traces' is not one"
    if not all(map(_is_measured, recorded["phases"])):
        return "one of 'phases' is not one"
    return None


def _is_trace(trace: Any) -> bool:
    """Tell whether a trace has answers to each of its events."""
    if not isinstance(trace, dict):
        return False
    meta, texts = trace.get("meta"), trace.get("oom")
    fields, events, rows = (trace.get(name) for name in ("fields", "events", "rows"))
    return (
        isinstance(meta, dict)
        and isinstance(meta.get("name"), str)
        and isinstance(fields, list)
        and isinstance(events, list)
        and isinstance(rows, list)
        and len(events) == len(rows)
        and all(isinstance(row, list) and len(row) == len(fields) for row in rows)
        and isinstance(texts, dict)
        and all(index.isascii() and index.isdigit() for index in texts)
    )


def _is_measured(phases: Any) -> bool:
    """Tell whether this is a plan and the figures of its phases."""
    if not isinstance(phases, dict):
        return False
    plan, measured = phases.get("plan"), phases.get("phases")
    return (
        isinstance(plan, dict)
        and all(isinstance(each, str) for each in plan.values())
        and isinstance(measured, dict)
        and all(isinstance(each, dict) for each in measured.values())
    )
