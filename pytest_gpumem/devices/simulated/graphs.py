"""``torch.cuda.CUDAGraph`` and ``torch.cuda.MemPool`` on a simulated card.

Source: ``aten/src/ATen/cuda/CUDAGraph.cpp``, ``CUDAGeneratorImpl.cpp`` and
``MemPool.cpp``, and ``torch/csrc/cuda/Module.cpp``, torch 2.13: the order of their
requests to the allocator, their checks and their error messages. Differences between
versions are in ``allocator/versions.py``.
"""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from functools import partial, update_wrapper
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.allocator.pools import DEFAULT
from pytest_gpumem.allocator.versions import StateHolder
from pytest_gpumem.devices.cuda_errors import cuda_error
from pytest_gpumem.devices.simulated.capture import (
    Capture,
    begin,
    capture_of,
    forget,
)
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.memory import Memory, allocate_aside
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.rng import CardGenerator, generator_of

if TYPE_CHECKING:
    from pytest_gpumem.allocator.blocks import Block
    from pytest_gpumem.allocator.caching import CachingAllocator
    from pytest_gpumem.allocator.pools import PoolId
    from pytest_gpumem.devices.simulated.card import SimulatedCard
    from pytest_gpumem.devices.simulated.tape import Tape

#: Pools of graphs and pools of users are numbered separately.
#: Source: ``MemPool::uuid_``, ``uid_``.
_graphs: Final = itertools.count(1)
_users: Final = itertools.count(1)
#: Bytes of a generator's seed and offset, which a graph's kernels read from the card.
#: Source: ``CUDAGeneratorState``: two tensors of one ``int64`` each.
_GENERATOR_BYTES: Final = (8, 8)
_MODES: Final = ("global", "thread_local", "relaxed")
#: Methods that inspect CUDA's own graph; torch's Python class has them in some versions.
_OF_THE_RAW_GRAPH: Final = (
    "debug_dump",
    "get_graph_data",
    "raw_cuda_graph",
    "raw_cuda_graph_exec",
)


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


class _Owned:
    """The resources of a graph on its card; they are released when it is deleted.

    Attributes:
        card: The card, from the start of a capture until the release.
        stream: The stream on which the capture began.
        capture: The capture in progress.
        pool: The id of the graph's pool.
        retained: Ids of other pools that the capture uses.
        blocks: Memory for the states of generators.
        has_begun: Whether the graph is a user of its pool.
        is_routed: Whether requests are routed to the pool.
        tape: The captured operators, once the capture has ended without an error.
    """

    def __init__(self) -> None:
        self.card: SimulatedCard | None = None
        self.stream = 0
        self.capture: Capture | None = None
        self.pool: PoolId = DEFAULT
        self.retained: list[PoolId] = []
        self.blocks: list[Block] = []
        self.has_begun = self.is_routed = False
        self.tape: Tape | None = None

    def release(self) -> None:
        """Release everything; the pool then has one user less."""
        card, self.card = self.card, None
        if card is None:
            return
        capture, self.capture = self.capture, None
        if capture is not None:
            capture.streams = set()
            forget(capture)
        for block in self.blocks:
            card.release(block)
        self.blocks.clear()
        has_ended, self.tape = self.tape is not None, None
        if has_ended or (self.has_begun and card.version.releases_failed_captures):
            card.clear_workspaces(self.stream)  # also the workspaces of other graphs
            if self.is_routed and not has_ended:
                card.later(partial(_end, pool=self.pool))
            for pool in (self.pool, *self.retained):
                card.later(partial(_release, pool=pool))
        self.retained = []
        self.has_begun = self.is_routed = False

    def __del__(self) -> None:
        self.release()


class CUDAGraph:
    """Operators that are captured on a stream and can be run again: C++'s ``_CUDAGraph``.

    Args:
        keep_graph: Whether the graph is kept after the capture. It must then be prepared
            with ``instantiate``.

    Limits: see ``tape.py``.
    """

    def __new__(cls, keep_graph: bool = False) -> CUDAGraph:  # noqa: ARG004, FBT001, FBT002, PYI034  # torch's signature; Self needs 3.11
        """Make an object; torch's own class passes its arguments on."""
        return object.__new__(cls)

    def __init__(self, keep_graph: bool = False) -> None:  # noqa: FBT001, FBT002  # torch's signature
        self._keeps = keep_graph
        self._generators: list[CardGenerator] = []
        self._states: list[_State] = []
        self._is_ready = False
        self._owned = _Owned()

    @property
    def _has_graph_exec(self) -> bool:
        """Whether the graph can be run again."""
        return self._is_ready

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

    def _retain_pool(self, pool: PoolId) -> None:
        """Count the graph as a user of a pool that the capture uses, until ``reset``."""
        owned = self._owned
        if owned.card is None or pool in (owned.pool, *owned.retained):
            return
        with owned.card.locked() as allocator:
            allocator.use_pool(pool)
        owned.retained.append(pool)

    def register_generator_state(self, generator: Any) -> None:
        """Allow draws from a generator in the capture; from torch 2.14 on all may draw.

        Raises:
            torch.OutOfMemoryError: The card has no room for its state.
        """
        holder = card_of(None).version.generator_states
        if holder is StateHolder.DRAW:
            return
        if generator._cdata not in {each._cdata for each in self._generators}:
            self._generators.append(generator)
            if holder is StateHolder.GENERATOR:
                self._states.append(_state_of(generator))

    def capture_begin(
        self, pool: PoolId | None = None, capture_error_mode: str = "global"
    ) -> None:
        """Begin to capture the current stream; its requests are served from a pool.

        Raises:
            RuntimeError: The graph has already captured, the stream is the default stream,
                or the pool cannot be shared (torch's messages).
            TypeError: The pool is not an id of a pool, which is two numbers.
            torch.AcceleratorError: The stream is being captured (CUDA's message).
            torch.OutOfMemoryError: The card has no room for the states of the generators.
        """
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
        owned = self._owned
        holder = card.version.generator_states
        self.register_generator_state(generator_of(card))
        registered = None if holder is StateHolder.DRAW else self._generators
        if holder is StateHolder.CAPTURE:
            for _generator in self._generators:
                owned.blocks += _state_blocks(card)
        owned.card, owned.stream = card, stream
        owned.pool = (next(_graphs), 0) if pool in (None, DEFAULT) else pool
        under_way = capture_of(card)
        blocks = owned.blocks

        def register() -> None:
            blocks.extend(_state_blocks(card))

        capture = Capture(card, stream, registered, weakref.ref(self), register)
        with card.locked() as allocator:
            allocator.begin_pool(owned.pool, capture.takes, captures=True)
        owned.has_begun = owned.is_routed = True
        if under_way is not None:
            under_way.is_invalid = True
            raise cuda_error("cudaErrorIllegalState")
        owned.capture = capture
        begin(capture)

    def capture_end(self) -> None:
        """End the capture, and prepare the graph for ``replay`` unless it is kept.

        Raises:
            RuntimeError: There is no capture, or it began on another stream than the current
                one (torch's messages).
            torch.AcceleratorError: A call during the capture was not allowed (CUDA's
                message). Up to torch 2.14 the pool then exists until the process ends.
        """
        self.capture_end_pre()
        self._is_ready = not self._keeps

    def capture_end_pre(self) -> None:
        """End the capture; ``instantiate`` and ``capture_end_post`` follow."""
        owned = self._owned
        capture, card = owned.capture, owned.card
        if capture is None or card is None:
            raise RuntimeError(card_of(None).version.asserts.no_capture)
        if card.machine.streams.current(card.index) != capture.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        owned.capture = None
        forget(capture)
        with card.locked() as allocator:
            allocator.end_capture()
            if not card.version.releases_failed_captures:
                capture.end()
            allocator.end_pool(owned.pool)
            owned.is_routed = False
        capture.end()
        if not capture.num_nodes:
            warnings.warn(
                "The CUDA Graph is empty. This usually means that the graph was "
                "attempted to be captured on wrong device or stream.",
                stacklevel=2,
            )
        owned.tape = capture.tape

    def capture_end_post(self) -> None:
        """Do nothing: a real card deletes the description of a graph that is not kept."""

    def instantiate(self) -> None:
        """Prepare a kept graph for ``replay``.

        Raises:
            RuntimeError: Nothing was captured, or the graph is not kept (torch's messages).
        """
        if self._owned.tape is None:
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
        tape, card = self._owned.tape, self._owned.card
        if tape is None or card is None:
            raise RuntimeError(
                "Called CUDAGraph::replay without a preceding successful capture."
            )
        self._is_ready = True
        outer = capture_of(card)
        if outer is not None:
            outer.note_work(card.machine.streams.current(card.index))
            outer.tape.keep_call(tape.replay)
            return
        tape.replay()

    def reset(self) -> None:
        """Delete the captured graph; its pool has one user less."""
        self._owned.release()
        self._generators = []
        self._is_ready = False

    def pool(self) -> PoolId:
        """Return the id of the graph's pool, which other graphs can share.

        Raises:
            RuntimeError: Nothing was captured (torch's message).
        """
        return self._pools("pool")[0]

    def pools(self) -> list[PoolId]:
        """Return the ids of all pools that the graph keeps, its own first.

        Raises:
            RuntimeError: Nothing was captured (torch's message).
        """
        return self._pools("pools")

    def _pools(self, function: str) -> list[PoolId]:
        if self._owned.tape is None:
            raise RuntimeError(
                f"Called CUDAGraph::{function}() without a preceding successful capture."
            )
        return [self._owned.pool, *self._owned.retained]

    def enable_debug_mode(self) -> None:
        """Do nothing: there is no CUDA graph that could be dumped."""

    def debug_dump(self, _debug_path: str, **_options: Any) -> None:
        """Refuse: there is no real CUDA graph."""
        refuse("CUDAGraph.debug_dump")

    def _refuse_raw(self, *_args: Any) -> Any:
        """Refuse: there is no real CUDA graph."""
        refuse("CUDAGraph.raw_cuda_graph")

    raw_cuda_graph = raw_cuda_graph_exec = get_graph_data = _refuse_raw
    begin_capture_to_if_node = begin_capture_to_while_node = _refuse_raw
    end_capture_to_conditional_node = _refuse_raw
    set_conditional_handle_for_current_node = _refuse_raw


class _State:
    """Memory for the state of a generator, held by all graphs that know the generator."""

    def __init__(self, card: SimulatedCard) -> None:
        self.memory = [Memory(card, nbytes) for nbytes in _GENERATOR_BYTES]


#: The states of generators, by the address of the generator's C++ object.
_states: Final[weakref.WeakValueDictionary[int, _State]] = weakref.WeakValueDictionary()


def _state_of(generator: CardGenerator) -> _State:
    """Return the state of a generator; its first graph allocates the memory."""
    state = _states.get(generator._cdata)
    if state is None:
        state = _states[generator._cdata] = _State(card_of(generator.device.index))
    return state


def _state_blocks(card: SimulatedCard) -> list[Block]:
    """Allocate the memory of one generator's seed and offset."""
    return [allocate_aside(card, nbytes, 0) for nbytes in _GENERATOR_BYTES]


def _python_class() -> type:
    """Return torch's own Python class of graphs, on the simulated ``_CUDAGraph``.

    The class has the hooks and all methods that a version adds in Python, except those
    that inspect CUDA's own graph.
    """
    original: Any = torch.cuda.graphs.CUDAGraph
    cell: Any = CellType()  # ``super()`` without arguments reads this cell

    def based(member: Any) -> Any:
        if isinstance(member, staticmethod):
            return staticmethod(based(member.__func__))
        names = member.__code__.co_freevars if isinstance(member, FunctionType) else ()
        if "__class__" not in names:
            return member
        outer = zip(names, member.__closure__, strict=True)
        closure = tuple(cell if name == "__class__" else each for name, each in outer)
        copy = FunctionType(
            member.__code__,
            member.__globals__,
            member.__name__,
            member.__defaults__,
            closure,
        )
        copy.__kwdefaults__ = member.__kwdefaults__
        return update_wrapper(copy, member)

    left_out = {"__dict__", "__weakref__", *_OF_THE_RAW_GRAPH}
    members = {
        name: based(member)
        for name, member in vars(original).items()
        if name not in left_out
    }
    torchs_begin = members["capture_begin"]

    def capture_begin(
        self: Any,
        pool: Any = None,
        capture_error_mode: str = "global",
        check_input_liveness: bool = False,  # noqa: FBT001, FBT002  # torch's signature
    ) -> None:
        if check_input_liveness:  # the check searches the pool for a tensor's address
            refuse("torch.cuda.graph(check_input_liveness=True)")
        torchs_begin(self, pool, capture_error_mode)

    members["capture_begin"] = update_wrapper(capture_begin, torchs_begin)
    made = type("CUDAGraph", (CUDAGraph,), members)
    cell.cell_contents = made
    return made


def _release(allocator: CachingAllocator, pool: PoolId) -> None:
    allocator.release_pool(pool)


def _end(allocator: CachingAllocator, pool: PoolId) -> None:
    allocator.end_pool(pool)


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
        torch.cuda.init()
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

_PYTHON_CLASS: Final = _python_class()
#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (torch.cuda, "CUDAGraph", _PYTHON_CLASS),
    (torch.cuda.graphs, "CUDAGraph", _PYTHON_CLASS),
    (torch.cuda, "MemPool", MemPool),
    (torch.cuda.memory, "MemPool", MemPool),
    # The cached stream belongs to the cards that were installed at its first use.
    (torch.cuda.graphs.graph, "default_capture_stream", None),
)
