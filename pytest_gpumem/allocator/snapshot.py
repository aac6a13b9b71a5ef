"""The allocator's segments in the format of ``torch.cuda.memory_snapshot``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpumem.allocator.pools import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.allocator.blocks import Block, Segment
    from pytest_gpumem.allocator.heap import Heap
    from pytest_gpumem.allocator.pools import PoolId


def blocks_of(segment: Segment) -> Iterator[Block]:
    """Yield a segment's blocks in address order."""
    block: Block | None = segment.first
    while block is not None:
        yield block
        block = block.next


def state_of(block: Block) -> str:
    """Return torch's name for a block's state."""
    if block.is_allocated:
        return "active_allocated"
    return "inactive" if block.is_idle else "active_pending_free"


def _frames(block: Block) -> Any:
    """Return the stack frames that requested a block; a free block has none."""
    return [] if block.is_idle else block.frames or []


def snapshot(allocator: Heap, pool_id: PoolId = DEFAULT) -> list[dict[str, Any]]:
    """Return every segment with its blocks, sorted by address.

    With ``pool_id`` of a private pool, return only that pool's segments. Each contiguous
    range of mapped pages of an expandable segment is a separate entry.

    Source: ``torch/cuda/memory.py``, ``memory_snapshot`` (the keys).
    """
    return [
        _segment(segment, run, allocator.device_index)
        for segment in allocator.segments()
        if pool_id in (DEFAULT, segment.pool.owner)
        for run in _runs(segment)
    ]


def _runs(segment: Segment) -> Iterator[list[Block]]:
    """Yield the contiguous mapped ranges of a segment."""
    run: list[Block] = []
    for block in blocks_of(segment):
        if block.is_mapped:
            run.append(block)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _segment(
    segment: Segment, blocks: list[Block], device_index: int
) -> dict[str, Any]:
    live = [block for block in blocks if block.is_allocated]
    active = [block for block in blocks if not block.is_idle]
    return {
        "device": device_index,
        "address": blocks[0].address,
        "total_size": sum(block.size for block in blocks),
        "allocated_size": sum(block.size for block in live),
        "active_size": sum(block.size for block in active),
        "requested_size": sum(block.requested for block in active),
        "stream": segment.stream,
        "segment_type": "small" if segment.is_small else "large",
        "segment_pool_id": segment.pool.owner,
        "is_expandable": segment.is_expandable,
        "frames": segment.frames or [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": state_of(block),
                "frames": _frames(block),
            }
            for block in blocks
        ],
    }
