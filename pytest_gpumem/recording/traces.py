"""Allocator traces played with tensors through torch's public functions."""

from __future__ import annotations

import random
from typing import Any, Final

import torch

from pytest_gpumem.allocator.config import config_text
from pytest_gpumem.allocator.replay import replay
from pytest_gpumem.allocator.trace_fields import STATS
from pytest_gpumem.recording.facts import free_everything

#: Bytes that a trace may reserve: enough for every size class, and soon full.
CAPACITY: Final = 192 * 2**20
_EVENTS: Final = 400
_STREAMS: Final = 2
#: The columns that do not depend on the addresses that cudaMalloc returns.
FIELDS: Final = [*STATS, "oom"]
_POLICIES: Final = ("firstfit", "down")


def make_events(seed: int) -> list[dict[str, Any]]:
    """Return a random trace: small, large and oversized requests on two streams."""
    draw = random.Random(seed)  # noqa: S311  # a repeatable trace
    events: list[dict[str, Any]] = []
    alive: list[int] = []
    for number in range(_EVENTS):
        choice = draw.random()
        if choice < 0.6 or not alive:  # noqa: PLR2004  # a little more is allocated than freed
            high = draw.choice((10, 16, 20, 22, 26, 28, 28))
            events.append(
                {
                    "op": "alloc",
                    "id": number,
                    "bytes": int(2 ** draw.uniform(4, high)),
                    "stream": 0 if draw.random() < 0.8 else 1,  # noqa: PLR2004  # mostly the default stream
                }
            )
            alive.append(number)
        elif choice < 0.96:  # noqa: PLR2004  # the rest is rare
            gone = alive.pop(draw.randrange(len(alive)))
            events.append({"op": "free", "id": gone})
        else:
            events.append({"op": draw.choice(("empty_cache", "reset_peak"))})
    events += [{"op": "free", "id": each} for each in alive]
    events.append({"op": "empty_cache"})
    return events


def play(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Play a trace on the current card, under a cap of ``CAPACITY`` bytes.

    Returns:
        The trace, with a row of statistics after each event, as ``replay`` reads it.
    """
    free_everything()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    base_stats = torch.cuda.memory_stats()
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()][:_STREAMS]
    fraction = CAPACITY / total
    blocks: dict[int, torch.Tensor | None] = {}
    rows: list[list[int]] = []
    texts: dict[str, str] = {}
    torch.cuda.set_per_process_memory_fraction(fraction)
    try:
        rows.append(_row(base_stats, failed=False))
        for index, event in enumerate(events, start=1):
            text = _step(event, blocks, streams)
            if text is not None:
                texts[str(index)] = text
            rows.append(_row(base_stats, failed=text is not None))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        blocks.clear()
        free_everything()
    meta: dict[str, Any] = {
        "name": name,
        "total_bytes": total,
        "ctx": context,
        "conf": config_text(),
        "streams": {"0": 0, "1": 1},
    }
    trace = {
        "meta": meta,
        "fields": FIELDS,
        "events": [{"op": "set_fraction", "fraction": fraction}, *events],
        "rows": rows,
        "oom": texts,
    }
    meta["addr"] = _address_policy(trace)
    return trace


def _step(
    event: dict[str, Any],
    blocks: dict[int, torch.Tensor | None],
    streams: list[Any],
) -> str | None:
    kind = event["op"]
    if kind == "alloc":
        try:
            with torch.cuda.stream(streams[event["stream"]]):
                blocks[event["id"]] = torch.empty(
                    event["bytes"], dtype=torch.uint8, device="cuda"
                )
        except torch.OutOfMemoryError as error:
            blocks[event["id"]] = None
            return str(error)
    elif kind == "free":
        del blocks[event["id"]]
    elif kind == "empty_cache":
        torch.cuda.empty_cache()
    else:
        torch.cuda.reset_peak_memory_stats()
    return None


def _row(base: dict[str, Any], *, failed: bool) -> list[int]:
    """Return the statistics; counters begin with 0 at the trace's start."""
    stats = torch.cuda.memory_stats()
    row = []
    for column, name in STATS.items():
        value = stats.get(name, 0)
        if column.startswith("num_"):
            value -= base.get(name, 0)
        row.append(value)
    return [*row, int(failed)]


def _address_policy(trace: dict[str, Any]) -> str:
    """Return the model's order of addresses that explains the rows.

    The addresses that the driver gives to segments decide between free blocks of one
    size. If no order explains every row, the first order is returned, and a comparison
    with the rows then shows the difference.
    """
    for policy in _POLICIES:
        meta = {**trace["meta"], "addr": policy}
        if replay({**trace, "meta": meta}).rows == trace["rows"]:
            return policy
    return _POLICIES[0]


def play_all() -> list[dict[str, Any]]:
    """Play three traces; see ``play``."""
    return [play(make_events(seed), f"random {seed}") for seed in range(3)]
