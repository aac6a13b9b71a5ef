"""Bytes that CUDA's sorts take for themselves, by how much they sort.

Sources: CUB's ``dispatch_radix_sort.cuh`` (``InvokeOnesweep``, ``InvokeSingleTile``),
``tuning_radix_sort.cuh`` (the policies for compute capability 8.0) and
``util_device.cuh`` (``AliasTemporaries``); ``aten/src/ATen/native/cuda/Sort.cpp`` and
``SortStable.cu``, torch 2.13. The sizes of tiles were found in recordings.
"""

from __future__ import annotations

from typing import Final

#: What each part of a buffer is rounded up to, and what may be lost in front of it.
_ALIGNMENT: Final = 256
#: Digits of one pass, and their bits.
_DIGITS: Final = 256
_DIGIT_BITS: Final = 8
_COUNTER_BYTES: Final = 8
_OFFSET_BYTES: Final = 4
#: Pairs that one block sorts at once, where an index of 8 bytes goes with each key.
_TILE: Final = 3072
#: The same for the numbers of segments.
_SEGMENTS_TILE: Final = 3840
#: So many pairs are sorted by a single block.
_SINGLE_TILE: Final = 2304
#: Bytes that a single block asks for: none, and so one.
_NOTHING: Final = 1
INDEX_BYTES: Final = 8


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _other_buffers(count: int, key_bytes: int) -> int:
    return _rounded(count * key_bytes) + _rounded(count * INDEX_BYTES)


def pairs_bytes(count: int, key_bytes: int, bits: int, tile: int = _TILE) -> int:
    """Return what sorting keys with their indices asks for, in bytes.

    Args:
        count: Pairs.
        key_bytes: Of a key.
        bits: Bits of a key that are looked at.
        tile: Pairs that one block sorts at once.

    Limits: keys of fewer than four bytes are sorted by an older algorithm, whose
    buffers for counting depend on the kernel's occupancy; these are left out.
    """
    if count <= _SINGLE_TILE:
        return _NOTHING
    passes = -(-bits // _DIGIT_BITS)
    nbytes = _ALIGNMENT - 1
    if passes > 1:
        nbytes += _other_buffers(count, key_bytes)
    if key_bytes >= _OFFSET_BYTES:
        blocks = -(-count // tile)
        nbytes += passes * _DIGITS * _COUNTER_BYTES
        nbytes += blocks * _DIGITS * _OFFSET_BYTES
        nbytes += _ALIGNMENT  # counters of the passes
    return nbytes


def segments_bytes(count: int, segments: int) -> int:
    """Return what sorting pairs by the number of their segment asks for, in bytes."""
    return pairs_bytes(count, _OFFSET_BYTES, segments.bit_length(), _SEGMENTS_TILE)


def segmented_bytes(count: int, key_bytes: int) -> int:
    """Return what sorting many segments at once asks for, in bytes."""
    return _other_buffers(count, key_bytes) + _ALIGNMENT - 1
