"""Descriptions of machines and limits in reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_gpumem.records.memory_figures import Kind
    from pytest_gpumem.records.record import LimitOutcome
    from pytest_gpumem.records.run_record import Environment


def environment_line(machine: Environment) -> str:
    """Return a machine on one line: host, versions, cards."""
    parts = [
        f"host {machine.host}",
        machine.platform,
        f"Python {machine.python}",
        f"torch {machine.torch}",
        f"backend {machine.backend}",
    ]
    if machine.driver:
        parts.append(f"driver {machine.driver}")
    for each in machine.cards:
        budget = each.budget_bytes
        share = "" if budget is None else f", budget {format_size(budget)}"
        parts.append(f"{each.name} {format_size(each.total_bytes)}{share}")
    return " · ".join(parts)


def outcome_words(outcomes: Mapping[str, int]) -> str:
    """Return how many tests ended in each way, as pytest's last line does."""
    first = [each for each in ("failed", "passed", "skipped") if each in outcomes]
    names = dict.fromkeys((*first, *outcomes))
    return ", ".join(f"{outcomes[name]} {name}" for name in names)


def kinds_words(kinds: Mapping[Kind, int]) -> str:
    """Return bytes by kind, the most first: ``"weights 1 MiB, activations 2 KiB"``."""
    most_first = sorted(kinds, key=lambda kind: -kinds[kind])
    return ", ".join(f"{kind} {format_size(kinds[kind])}" for kind in most_first)


def limit_words(limit: LimitOutcome) -> str:
    """Return a limit's metric, card and phase: ``"allocated on cuda:0, call"``."""
    if limit.metric == "host":
        return f"host memory, {limit.phase}"
    index = limit.device_index
    where = "all cards" if index is None else f"cuda:{index}"
    return f"{limit.metric} on {where}, {limit.phase}"
