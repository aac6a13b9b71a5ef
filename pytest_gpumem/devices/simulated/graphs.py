"""``torch.cuda.CUDAGraph`` and ``torch.cuda.MemPool`` on a simulated card.

Source: ``aten/src/ATen/cuda/CUDAGraph.cpp``, ``CUDAGeneratorImpl.cpp`` and
``MemPool.cpp``, and ``torch/csrc/cuda/Module.cpp``, torch 2.13: the order of their
requests to the allocator, their checks and their error messages.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.allocator.pools import DEFAULT
from pytest_gpumem.devices.cuda_errors import cuda_error
from pytest_gpumem.devices.simulated.capture import (
    Capture,
    begin,
    capture_of,
    forget,
)
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.memory import allocate_aside
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.rng import CardGenerator, generator_of

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.allocator.caching import CachingAllocator
    from pytest_gpumem.allocator.pools import PoolId
    from pytest_gpumem.devices.simulated.card import SimulatedCard

#: Pools of graphs and pools of users are numbered separately.
#: Source: ``MemPool::uuid_``, ``uid_``.
_graphs: Final = itertools.count(1)
_users: Final = itertools.count(1)
#: Bytes of a generator's seed and offset, which a graph's kernels read from the card.
#: Source: ``CUDAGeneratorState``: two tensors of one ``int64`` each.
_GENERATOR_BYTES: Final = (8, 8)
_MODES: Final = ("global", "thread_local", "relaxed")


def pool_handle() -> PoolId:
    """Return a new id for a pool that does not exist yet: ``graph_pool_handle``."""
    return 0, next(_users)


def _check_pool(function: str, pool: Any) -> None:
    """Check the id of a pool, as pybind11 does for a pair of numbers."""
    is_pair = isinstance(pool, (tuple, list)) and len(pool) == len(DEFAULT)
    if pool is None or (is_pair and all(isinstance(each, int) for each in pool)):
        return
    raise TypeError(
        f"{function}(): incompatible function arguments. A pool is the pair of numbers "
        "that torch.cuda.graph_pool_handle(), CUDAGraph.pool() or MemPool.id gives, not "
        f"{pool!r}"
    )


class CUDAGraph:
    """Operators that are captured on a stream and can be run again.

    Args:
        keep_graph: Whether the graph is kept after the capture. It must then be prepared
            with ``instantiate``.

    Limits: see ``tape.py``.
    """

    def __init__(self, keep_graph: bool = False) -> None:  # noqa: FBT001, FBT002  # torch's signature
        self._keeps = keep_graph
        self._generators: list[CardGenerator] = []
        self._blocks: list[Block] = []
        self._card: SimulatedCard | None = None
        self._stream = 0
        self._capture: Capture | None = None
        self._pool: PoolId = DEFAULT
        self._has_ended = self._is_ready = False
        self._retained: list[MemPool] = []

    @staticmethod
    def get_currently_capturing_graph() -> CUDAGraph:
        """Return the graph whose capture the current stream takes part in.

        Raises:
            RuntimeError: The current stream is not captured (torch's message).
        """
        capture = capture_of(card_of(None))
        graph: CUDAGraph | None = None if capture is None else capture.graph()
        if graph is None:
            raise RuntimeError("The current stream is not currently capturing.")
        return graph

    def _retain_pool(self, pool: MemPool) -> None:
        """Keep a pool that the capture uses until ``reset``, as torch does from 2.15 on."""
        self._retained.append(pool)

    def register_generator_state(self, generator: Any) -> None:
        """Allow draws from a generator in the capture."""
        if generator._cdata not in {each._cdata for each in self._generators}:
            self._generators.append(generator)

    def capture_begin(
        self,
        pool: PoolId | None = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,  # noqa: FBT001, FBT002  # torch's signature
    ) -> None:
        """Begin to capture the current stream; its requests are served from a pool.

        Raises:
            RuntimeError: The graph has already captured, the stream is the default stream,
                or the pool cannot be shared (torch's messages).
            TypeError: The pool is not an id of a pool, which is two numbers.
            torch.AcceleratorError: The stream is being captured (CUDA's message).
            torch.OutOfMemoryError: The card has no room for the states of the generators.
        """
        if check_input_liveness:
            refuse("torch.cuda.graph(check_input_liveness=True)")
        if capture_error_mode not in _MODES:
            raise RuntimeError(
                "Unknown capture error mode. Expected `global`, `thread_local`, or "
                f"`relaxed`, got {capture_error_mode}"
            )
        if self._is_ready:
            raise RuntimeError(
                "This CUDAGraph instance already owns a captured graph. To capture a "
                "new graph, create a new instance."
            )
        _check_pool("capture_begin", pool)
        card = card_of(None)
        stream = card.machine.streams.current(card.index)
        if not stream:
            raise RuntimeError(
                "CUDA graphs must be captured on a non-default stream. (However, after "
                "capture, it's ok to replay them on the default stream.)"
            )
        self.register_generator_state(generator_of(card))
        for nbytes in _GENERATOR_BYTES * len(self._generators):
            self._blocks.append(allocate_aside(card, nbytes, 0))
        self._card, self._stream = card, stream
        self._pool = (next(_graphs), 0) if pool in (None, DEFAULT) else pool
        under_way = capture_of(card)
        capture = Capture(card, stream, self._generators, weakref.ref(self))
        with card.locked() as allocator:
            allocator.begin_pool(self._pool, capture.takes, captures=True)
        if under_way is not None:
            under_way.is_invalid = True
            raise cuda_error("cudaErrorIllegalState")
        self._capture = capture
        begin(capture)

    def capture_end(self) -> None:
        """End the capture.

        Raises:
            RuntimeError: There is no capture, or it began on another stream than the current
                one (torch's messages).
            torch.AcceleratorError: A call during the capture was not allowed (CUDA's
                message). The pool then exists until the process ends.
        """
        capture, card = self._capture, self._card
        if capture is None or card is None:
            raise RuntimeError(
                "num_active_captures_ > 0 INTERNAL ASSERT FAILED at "
                '"/__w/pytorch/pytorch/c10/cuda/CUDACachingAllocator.cpp":3211, please '
                "report a bug to PyTorch. markCaptureEnd called with no captures in "
                "progress"
            )
        if card.machine.streams.current(card.index) != capture.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        self._capture = None
        forget(capture)
        with card.locked() as allocator:
            allocator.end_capture()
            capture.end()
            allocator.end_pool(self._pool)
        if not capture.num_nodes:
            warnings.warn(
                "The CUDA Graph is empty. This usually means that the graph was "
                "attempted to be captured on wrong device or stream.",
                stacklevel=2,
            )
        self._tape = capture.tape
        self._has_ended = True
        self._is_ready = not self._keeps

    def instantiate(self) -> None:
        """Prepare a kept graph for ``replay``.

        Raises:
            RuntimeError: Nothing was captured, or the graph is not kept (torch's messages).
        """
        if not self._has_ended:
            raise RuntimeError(
                "capture_end() must have been called before calling instantiate"
            )
        if self._is_ready and not self._keeps:
            raise RuntimeError(
                "instantiate() is intended to be called by the user only when "
                "keep_graph=true"
            )
        self._is_ready = True

    def replay(self) -> None:
        """Run the captured operators again, on the present contents of their memory.

        Raises:
            RuntimeError: Nothing was captured (torch's message).
        """
        if not self._has_ended or self._card is None:
            raise RuntimeError(
                "Called CUDAGraph::replay without a preceding successful capture."
            )
        self._is_ready = True
        outer = capture_of(self._card)
        if outer is not None:
            outer.note_work(self._card.machine.streams.current(self._card.index))
            outer.tape.keep_call(self._tape.replay)
            return
        self._tape.replay()

    def reset(self) -> None:
        """Delete the captured graph; its pool has one user less."""
        card, self._card = self._card, None
        if card is None:
            return
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.streams = set()
            forget(capture)
        while self._blocks:
            card.release(self._blocks.pop())
        self._generators = []
        self._retained = []
        if self._has_ended:
            self._has_ended = self._is_ready = False
            del self._tape
            card.clear_workspaces(self._stream)  # also those of other graphs
            card.later(partial(_release, pool=self._pool))

    def __del__(self) -> None:
        self.reset()

    def pool(self) -> PoolId:
        """Return the id of the graph's pool, which other graphs can share.

        Raises:
            RuntimeError: Nothing was captured (torch's message).
        """
        if not self._has_ended:
            raise RuntimeError(
                "Called CUDAGraph::pool() without a preceding successful capture."
            )
        return self._pool

    def enable_debug_mode(self) -> None:
        """Do nothing: there is no CUDA graph that could be dumped."""

    def debug_dump(self, _debug_path: str) -> None:
        """Refuse: there is no real CUDA graph."""
        refuse("CUDAGraph.debug_dump")

    def _refuse_raw(self, *_args: Any) -> Any:
        """Refuse: there is no real CUDA graph."""
        refuse("CUDAGraph.raw_cuda_graph")

    raw_cuda_graph = raw_cuda_graph_exec = get_graph_data = _refuse_raw
    begin_capture_to_if_node = end_capture_to_conditional_node = _refuse_raw


def _release(allocator: CachingAllocator, pool: PoolId) -> None:
    allocator.release_pool(pool)


class MemPool:
    """A memory pool for the requests inside ``torch.cuda.use_mem_pool``.

    Args:
        allocator: Must be None; a custom allocator is refused.
        use_on_oom: Whether the pool's free blocks may serve other requests for which the
            card has no room.
        no_split: Whether blocks are never split, and stay as large as their segments.

    Raises:
        UnsupportedOnSimulatedDeviceError: An allocator is given.
    """

    def __init__(
        self,
        allocator: Any = None,
        use_on_oom: bool = False,  # noqa: FBT001, FBT002  # torch's signature
        no_split: bool = False,  # noqa: FBT001, FBT002  # torch's signature
    ) -> None:
        if allocator is not None:
            refuse("torch.cuda.CUDAPluggableAllocator")
        self.id: PoolId = pool_handle()
        self._card = card_of(None)
        with self._card.locked() as model:
            model.use_pool(self.id, on_oom=use_on_oom, splits=not no_split)

    @property
    def device(self) -> int:
        """The index of the pool's card."""
        return self._card.index

    @property
    def allocator(self) -> None:
        """None, because the pool uses PyTorch's own allocator."""

    def use_count(self) -> int:
        """Return the number of objects, graphs and ``with`` blocks that use the pool."""
        with self._card.locked() as allocator:
            return allocator.private_pools[self.id].use_count

    def snapshot(self, include_traces: bool = True) -> Any:  # noqa: FBT001, FBT002  # torch's signature
        """Return ``torch.cuda.memory_snapshot`` of only this pool."""
        # Older versions of torch.cuda.memory_snapshot have no traces.
        below: Any = torch._C
        taken = below._cuda_memorySnapshot((*self.id, include_traces))
        return taken["segments"]

    def __del__(self) -> None:
        if hasattr(self, "_card"):
            self._card.later(partial(_give_up, pool=self.id))


def _give_up(allocator: CachingAllocator, pool: PoolId) -> None:
    """Release a pool whose last object was deleted, and its free segments."""
    allocator.release_pool(pool)
    allocator.empty_cache(pool)


# -- the C functions behind torch.cuda ------------------------------------------------


def _route(index: int, pool: PoolId, takes: Any) -> None:
    with card_of(index).locked() as allocator:
        allocator.begin_pool(pool, takes)


def _route_thread(index: int, pool: PoolId) -> None:
    thread = threading.get_ident()
    _route(index, pool, lambda _stream: threading.get_ident() == thread)


def _route_stream(index: int, pool: PoolId) -> None:
    current = current_machine().streams.current(card_of(index).index)
    _route(index, pool, lambda stream: stream == current)


def _route_all(index: int, pool: PoolId) -> None:
    _route(index, pool, lambda _stream: True)


def _end_route(index: int, pool: PoolId) -> None:
    with card_of(index).locked() as allocator:
        allocator.end_pool(pool)


def _release_pool(index: int, pool: PoolId) -> None:
    with card_of(index).locked() as allocator:
        allocator.release_pool(pool)


def _is_capturing() -> bool:
    machine = current_machine()
    return bool(machine.captures) and capture_of(card_of(None)) is not None


#: Replacements in ``torch._C``.
C_GRAPHS: Final[dict[str, Any]] = {
    "_graph_pool_handle": pool_handle,
    "_CUDAGraph": CUDAGraph,
    "_MemPool": MemPool,
    "_cuda_isCurrentStreamCapturing": _is_capturing,
    "_cuda_beginAllocateCurrentThreadToPool": _route_thread,
    "_cuda_beginAllocateCurrentStreamToPool": _route_stream,
    "_cuda_beginAllocateToPool": _route_all,
    "_cuda_endAllocateToPool": _end_route,
    "_cuda_releasePool": _release_pool,
}

#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (torch.cuda, "CUDAGraph", CUDAGraph),
    (torch.cuda.graphs, "CUDAGraph", CUDAGraph),
    (torch.cuda, "MemPool", MemPool),
    (torch.cuda.memory, "MemPool", MemPool),
    # The cached stream belongs to the cards that were installed at its first use.
    (torch.cuda.graphs.graph, "default_capture_stream", None),
)
