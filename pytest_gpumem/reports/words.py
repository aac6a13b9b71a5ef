"""What reports say in words: machines, limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping


def environment_line(environment: Mapping[str, Any]) -> str:
    """Return a machine on one line: host, versions, cards."""
    parts = [
        f"host {environment.get('host')}",
        str(environment.get("platform")),
        f"Python {environment.get('python')}",
        f"torch {environment.get('torch')}",
        f"backend {environment.get('backend')}",
    ]
    if environment.get("driver"):
        parts.append(f"driver {environment['driver']}")
    for each in environment.get("cards", ()):
        budget = each.get("budget_bytes")
        share = "" if budget is None else f", budget {format_size(budget)}"
        parts.append(f"{each['name']} {format_size(each['total_bytes'])}{share}")
    return " · ".join(parts)


def limit_words(limit: Mapping[str, Any]) -> str:
    """Return what a limit is on: ``"allocated on cuda:0, call"``."""
    index = limit["device_index"]
    where = "all cards" if index is None else f"cuda:{index}"
    return f"{limit['metric']} on {where}, {limit['phase']}"
