"""The allocator's segments as ``torch.cuda.memory_snapshot`` shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.model.allocator import CachingAllocator
    from pytest_gpumem.model.blocks import Block, Segment


def blocks_of(segment: Segment) -> Iterator[Block]:
    """Yield a segment's blocks in address order."""
    block: Block | None = segment.first
    while block is not None:
        yield block
        block = block.next


def state_of(block: Block) -> str:
    """Return a block's state in torch's words."""
    if block.is_allocated:
        return "active_allocated"
    return "active_pending_free" if block.num_events else "inactive"


def snapshot(allocator: CachingAllocator) -> list[dict[str, Any]]:
    """Return every segment with its blocks, by address.

    Source: ``torch/cuda/memory.py``, ``memory_snapshot`` (the keys).
    """
    return [
        _segment(segment, allocator.device_index) for segment in allocator.segments()
    ]


def _segment(segment: Segment, device_index: int) -> dict[str, Any]:
    blocks = list(blocks_of(segment))
    live = [block for block in blocks if block.is_allocated]
    active = [block for block in blocks if block.is_allocated or block.num_events]
    return {
        "device": device_index,
        "address": segment.address,
        "total_size": segment.size,
        "allocated_size": sum(block.size for block in live),
        "active_size": sum(block.size for block in active),
        "requested_size": sum(block.requested for block in active),
        "stream": segment.stream,
        "segment_type": "small" if segment.is_small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": state_of(block),
                "frames": block.frames or [],
            }
            for block in blocks
        ],
    }
