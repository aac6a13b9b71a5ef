"""The temporary bytes of CUDA's sorts, by the number of elements.

Sources: CUB's ``dispatch_radix_sort.cuh`` (``InvokeOnesweep``, ``InvokeSingleTile``),
``tuning_radix_sort.cuh``, ``single_pass_scan_operators.cuh`` and ``tuning_scan.cuh``
(``Policy600``), ``dispatch_unique_by_key.cuh``, ``dispatch_scan_by_key.cuh``, and
``util_device.cuh`` (``AliasTemporaries``); ``aten/src/ATen/native/cuda/Sort.cpp`` and
``SortStable.cu``, torch 2.13. The sizes of tiles were found in recordings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pytest_gpumem.kernels.reduction_memory import Processors

#: Each part of a buffer is rounded up to a multiple of this, in bytes. Aligning the start
#: of the buffer may lose up to this many bytes.
_ALIGNMENT: Final = 256
#: Digit values in one pass, and bits of a digit.
_DIGITS: Final = 256
_DIGIT_BITS: Final = 8
_COUNTER_BYTES: Final = 8
_OFFSET_BYTES: Final = 4
#: Pairs that one block sorts at once, by the lowest compute capability, the bytes of a
#: key and the bytes of the index that belongs to it.
_TILES: Final = (
    ((9, 0), {(4, 8): 5376, (8, 8): 4608, (4, 4): 6528}),
    ((8, 0), {(4, 8): 3072, (8, 8): 3840, (4, 4): 6528}),
    ((0, 0), {(4, 8): 2816, (8, 8): 2816, (4, 4): 11_776}),
)
#: Pairs that one block sorts at once if the keys are numbers of segments.
_SEGMENTS_TILE: Final = 3840
#: Up to this many pairs are sorted by a single block.
_SINGLE_TILE: Final = 2304
#: A single block needs no memory, but CUB requests one byte.
_NOTHING: Final = 1
INDEX_BYTES: Final = 8
#: By the bytes of a small key: digit values in a pass, and threads of a block. Then the
#: blocks that are queued for each block that the card runs at once, and the elements that
#: one block of the scan over all digits processes.
_SMALL_KEYS: Final = {1: (32, 128), 2: (128, 256)}
_SUBSCRIPTION: Final = 5
_SPINE_TILE: Final = 5632
#: For running sums: threads of a block, 4-byte numbers per thread, and (``_WARP``) the
#: tile states before the first tile.
_SCAN_THREADS: Final = 128
_SCAN_ITEMS: Final = 15
_WARP: Final = 32


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def pairs_bytes(
    count: int,
    key_bytes: int,
    bits: int,
    processors: Processors,
    *,
    index_bytes: int = INDEX_BYTES,
    tile: int = 0,
) -> int:
    """Return the bytes that sorting keys with their indices requests.

    Args:
        count: Number of pairs.
        key_bytes: Bytes of a key.
        bits: Bits of a key that the sort compares.
        processors: The card's multiprocessors.
        index_bytes: Bytes of an index.
        tile: Pairs that one block sorts at once; 0 means as in the card's tuning.

    Limits: keys of fewer than four bytes are sorted by an older algorithm, whose
    counters depend on how many blocks of its kernel a multiprocessor holds. Here the
    number of threads alone limits them; registers may allow fewer.
    """
    if count <= _SINGLE_TILE:
        return _NOTHING
    buffers = _rounded(count * key_bytes) + _rounded(count * index_bytes)
    nbytes = _ALIGNMENT - 1
    if key_bytes < _OFFSET_BYTES:
        counters = _rounded(_spine(key_bytes, processors) * _COUNTER_BYTES)
        return nbytes + counters + buffers
    passes = -(-bits // _DIGIT_BITS)
    if passes > 1:
        nbytes += buffers
    tile = tile or _of(_TILES, processors)[key_bytes, index_bytes]
    blocks = -(-count // tile)
    nbytes += passes * _DIGITS * _COUNTER_BYTES
    nbytes += blocks * _DIGITS * _OFFSET_BYTES
    nbytes += _ALIGNMENT  # one counter for each pass
    return nbytes


def _spine(key_bytes: int, processors: Processors) -> int:
    """Return the counters of the digits of all blocks, plus one tile of their scan."""
    digits, threads = _SMALL_KEYS[key_bytes]
    blocks = processors.max_threads // threads * processors.count * _SUBSCRIPTION
    return blocks * digits + _SPINE_TILE


def scan_bytes(count: int, element_bytes: int, *, is_plain: bool) -> int:
    """Return the bytes that a running sum over contiguous numbers requests.

    Args:
        count: Number of elements.
        element_bytes: Bytes of an element.
        is_plain: Whether the element is a built-in type of CUB. Then a tile's sum and its
        state are one word; otherwise states, partial sums and sums are separate.
    """
    items = min(_SCAN_ITEMS * _OFFSET_BYTES // element_bytes, 2 * _SCAN_ITEMS)
    tiles = -(-count // (_SCAN_THREADS * items)) + _WARP
    if is_plain:
        word = max(2 * element_bytes, _OFFSET_BYTES)
        nbytes = _rounded(tiles * word)
    else:
        nbytes = _rounded(tiles * _OFFSET_BYTES) + 2 * _rounded(tiles * element_bytes)
    return nbytes + 2 * _ALIGNMENT - 1


def selection_bytes(
    slices: int, length: int, key_bytes: int, processors: Processors
) -> tuple[int, ...]:
    """Return the buffers, in bytes, for choosing the largest numbers of long rows.

    Several blocks count the digits of one row. The result is empty if one block is enough.

    Args:
        slices: Number of rows.
        length: Numbers in one row.
        key_bytes: Bytes of a number.
        processors: The card's multiprocessors.

    Source: ``mbtopk::launch``, ``should_use_sort`` and ``get_items_per_thread`` of
    ``aten/src/ATen/native/cuda/TensorTopK.cu``.
    """
    least = next(least for most, least in _SHORT_ROWS if slices <= most)
    if length < least:
        return ()
    at_once = processors.count * _SELECTING_BLOCKS * _SELECTING_THREADS
    items = max(4, min(-(-slices * length // at_once), 64))
    blocks = -(-length // (items * _SELECTING_THREADS)) * slices
    counters = blocks * _DIGITS * 2
    each = blocks * _OFFSET_BYTES
    wide = slices * _COUNTER_BYTES
    sums = slices * _DIGITS * _OFFSET_BYTES
    return (slices * key_bytes, wide, wide, counters, sums, each, each)


#: By the largest number of rows: the length from which several blocks share one row.
_SHORT_ROWS: Final = (
    (20, 20000),
    (40, 10000),
    (80, 8000),
    (199, 5000),
    (799, 3000),
    (4000, 800),
    (1 << 62, 400),
)
#: Threads of a block, and blocks for which a multiprocessor has enough registers.
_SELECTING_THREADS: Final = 256
_SELECTING_BLOCKS: Final = 6
#: Bytes that CUB takes to add the counts of the blocks.
SELECTION_SCAN_BYTES: Final = 1279


def segments_bytes(count: int, segments: int, processors: Processors) -> int:
    """Return the bytes that sorting pairs by the number of their segment requests."""
    bits = segments.bit_length()
    return pairs_bytes(count, _OFFSET_BYTES, bits, processors, tile=_SEGMENTS_TILE)


def segmented_bytes(count: int, key_bytes: int) -> int:
    """Return the bytes that sorting many segments at once requests."""
    buffers = _rounded(count * key_bytes) + _rounded(count * INDEX_BYTES)
    return buffers + _ALIGNMENT - 1


#: Keys that one block processes, by the lowest compute capability and the bytes of a key.
#: The first table is for finding keys that differ from the previous key, the second for
#: running sums that start again at such keys. Compute capabilities 8.6 and 8.9 have no
#: tuning of their own.
_UNIQUE_TILES: Final = (
    ((9, 0), {4: 7168, 8: 4928}),
    ((8, 1), {4: 704, 8: 320}),
    ((8, 0), {4: 2816, 8: 1344}),
    ((0, 0), {4: 704, 8: 320}),
)
_BY_KEY_TILES: Final = (
    ((10, 0), {4: 4480, 8: 5888}),
    ((9, 0), {4: 4032, 8: 2464}),
    ((8, 1), {4: 2304, 8: 2304}),
    ((8, 0), {4: 3840, 8: 2240}),
    ((0, 0), {4: 2304, 8: 2304}),
)
#: Bytes that a tile passes to the next one: a number and a state.
_TILE_STATE: Final = 16

_Tuning = tuple[tuple[tuple[int, int], dict[Any, int]], ...]


def _of(tuning: _Tuning, processors: Processors) -> dict[Any, int]:
    """Return the tuning for a card."""
    return next(found for least, found in tuning if least <= processors.capability)


def unique_bytes(count: int, key_bytes: int, processors: Processors) -> int:
    """Return the bytes that finding the changes in sorted keys requests."""
    tiles = -(-count // _of(_UNIQUE_TILES, processors)[key_bytes]) + _WARP
    return _rounded(tiles * _TILE_STATE) + 2 * _ALIGNMENT - 1


def scan_by_key_bytes(count: int, key_bytes: int, processors: Processors) -> int:
    """Return the bytes that running sums which start again at each key request."""
    tiles = -(-count // _of(_BY_KEY_TILES, processors)[key_bytes])
    states = _rounded((tiles + _WARP) * _TILE_STATE)
    return states + _rounded((tiles + 1) * key_bytes) + _ALIGNMENT - 1
