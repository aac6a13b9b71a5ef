"""The temporary memory of CUDA's reduction kernel.

If one block would have too many numbers to add, several blocks compute one result. They
exchange partial results and semaphores through memory of the caching allocator.

Source: ``setReduceConfig``, ``ReduceConfig`` and ``gpu_reduce_kernel`` of
``aten/src/ATen/native/cuda/Reduce.cuh``, torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Most threads of a block, and lanes of a warp. Source: ``Reduce.cuh``.
_MAX_THREADS: Final = 512
_WARP: Final = 32
_MIN_VALUES: Final = 16
_MAX_VALUES: Final = 256
_VECTOR: Final = 4
_VECTORISED_FROM: Final = 128
_SEMAPHORE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Processors:
    """The properties of a card that decide how a reduction is split.

    Attributes:
        count: Streaming multiprocessors.
        max_threads: Threads that one multiprocessor can hold.
        capability: Compute capability; CUB chooses its tuning by it.
    """

    count: int
    max_threads: int
    capability: tuple[int, int] = (8, 0)


@dataclass(frozen=True, slots=True)
class Axis:
    """A dimension of a tensor: its length, and its stride in elements."""

    length: int
    stride: int


def scratch_bytes(
    shape: Sequence[int],
    strides: Sequence[int],
    reduced: Sequence[int],
    element_bytes: int,
    processors: Processors,
) -> tuple[int, ...]:
    """Return the bytes that a reduction requests in addition to its result.

    Args:
        shape: Shape of the operand.
        strides: Strides of the operand, in elements.
        reduced: The dimensions that are reduced, counted from 0.
        element_bytes: Bytes of an accumulator: 4 for half and single precision.
        processors: The card's multiprocessors.

    Returns:
        Bytes of the exchange buffer and of the semaphores; empty if one block computes
        each result.
    """
    gone = set(reduced)
    inner = _merge([Axis(shape[i], strides[i]) for i in sorted(gone)])
    outer = _merge(
        [Axis(shape[i], strides[i]) for i in range(len(shape)) if i not in gone]
    )
    num_inputs = _numel(inner)
    num_outputs = _numel(outer)
    if not num_inputs or not num_outputs:
        return ()
    return _Config(inner, outer, num_inputs, num_outputs, element_bytes).split(
        processors
    )


def _merge(axes: Sequence[Axis]) -> list[Axis]:
    """Sort dimensions by stride, and join those that are contiguous."""
    merged: list[Axis] = []
    for axis in sorted(
        (each for each in axes if each.length != 1), key=lambda each: each.stride
    ):
        last = merged[-1] if merged else None
        if last is not None and last.stride * last.length == axis.stride:
            merged[-1] = Axis(last.length * axis.length, last.stride)
        else:
            merged.append(axis)
    return merged


def _numel(axes: Sequence[Axis]) -> int:
    count = 1
    for axis in axes:
        count *= axis.length
    return count


def _ceil(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _last_power(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)


class _Config:
    """How a reduction is spread over threads, warps and blocks."""

    def __init__(
        self,
        inner: list[Axis],
        outer: list[Axis],
        num_inputs: int,
        num_outputs: int,
        element_bytes: int,
    ) -> None:
        self._num_inputs = num_inputs
        self._num_outputs = num_outputs
        self._element_bytes = element_bytes
        self._step_input = 1
        self._step_output = 1
        self._vector = 1
        along_fastest = not outer or (bool(inner) and inner[0].stride < outer[0].stride)
        fastest = (inner if along_fastest else outer)[:1]
        if along_fastest:
            width, height = num_inputs, num_outputs
        else:
            width, height = num_outputs, num_inputs
        if fastest and fastest[0].stride == 1:
            if along_fastest and width >= _VECTORISED_FROM and len(inner) == 1:
                width //= _VECTOR
            elif not along_fastest:
                self._vector = _output_vector(inner, outer)
                width //= self._vector
        self._set_block(width, height)
        self._along_fastest = along_fastest or not (inner or outer)

    def _set_block(self, width: int, height: int) -> None:
        most = _MAX_THREADS // self._vector
        across = _last_power(width) if width < most else most
        down = _last_power(height) if height < most else most
        self._width = min(across, _WARP)
        self._height = min(down, most // self._width)
        self._width = min(across, most // self._height)

    @property
    def _values_per_thread(self) -> int:
        return _ceil(self._num_inputs, self._step_input)

    def split(self, processors: Processors) -> tuple[int, ...]:
        """Return the bytes of buffer and semaphores; empty if one block is enough."""
        if self._along_fastest:
            self._step_input *= self._width
        else:
            self._step_output *= self._width
        across_warps = self._values_per_thread >= min(
            self._height * _MIN_VALUES, _MAX_VALUES
        )
        if across_warps:
            self._step_input *= self._height
        else:
            self._step_output *= self._height
        blocks = processors.max_threads // (self._width * self._height)
        target = processors.count * blocks
        grid = _ceil(self._num_outputs // self._vector, self._step_output)
        values = self._values_per_thread
        if not across_warps or values < _MAX_VALUES or grid > target:
            return ()
        wanted = min(_ceil(target, grid), _ceil(values, _MIN_VALUES))
        shares = max(wanted, _ceil(values, _MAX_VALUES))
        if shares <= 1:
            return ()
        nbytes = self._element_bytes * self._num_outputs * shares
        if not self._along_fastest:
            nbytes *= self._width * self._vector
        return nbytes, _SEMAPHORE_BYTES * grid


def _output_vector(inner: list[Axis], outer: list[Axis]) -> int:
    """Return how many results a thread loads at once: ``get_output_vec_size``."""
    vector = _VECTOR
    sizes = [outer[0].length, *(axis.stride for axis in (*inner, *outer[1:]))]
    for size in sizes:
        while size % vector:
            vector //= 2
    return vector
