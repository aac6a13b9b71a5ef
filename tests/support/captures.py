"""What captures of graphs and private pools come to, told step by step.

The same program runs on PyTorch's own CUDA code (``tests/cuda_host/record_captures.py``,
which writes ``tests/recordings/captures.json.xz``) and on the simulated card.
"""

from __future__ import annotations

import contextlib
import gc
import json
import lzma
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 2**20
#: Bytes of the card that it runs on; its context takes none.
TOTAL_BYTES = 4 * 2**30
RECORDED = Path(__file__).parents[1] / "recordings" / "captures.json.xz"
_STATS = (
    "allocated_bytes.all.current",
    "active_bytes.all.current",
    "requested_bytes.all.current",
    "reserved_bytes.all.current",
    "inactive_split_bytes.all.current",
    "num_sync_all_streams",
    "num_device_alloc",
    "num_device_free",
    "num_alloc_retries",
    "num_ooms",
)


def _bytes(mebibytes: int) -> torch.Tensor:
    return torch.empty(mebibytes * MIB, dtype=torch.uint8, device="cuda")


def _block(block: Any) -> list[Any]:
    """Return a block; what a free one was asked for varies with the order of threads."""
    is_free = block["state"] == "inactive"
    return [block["size"], block["state"], 0 if is_free else block["requested_size"]]


class _Teller:
    """Notes what is there after each step."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []

    def tell(self, name: str, *values: Any) -> None:
        """Note statistics and segments, and any values."""
        stats = torch.cuda.memory_stats()
        pools = {
            key: value
            for key, value in stats.items()
            if key.startswith("reserved_bytes_by_private_pools") and value
        }
        segments = [
            [
                list(segment["segment_pool_id"]),
                segment["total_size"],
                [_block(block) for block in segment["blocks"]],
            ]
            for segment in torch.cuda.memory_snapshot()
        ]
        counted = [stats[key] for key in _STATS]
        self.rows.append([name, list(values), counted, pools, sorted(segments)])

    def attempt(self, name: str, action: Callable[[], Any]) -> None:
        """Note how an action ends: its error's class and the first line of its text."""
        try:
            action()
        except RuntimeError as error:
            text = str(error).partition("\n")[0]
            self.rows.append([name, type(error).__name__, text])
        else:
            self.rows.append([name, "ends", ""])


def recordings() -> dict[str, list[list[Any]]]:
    """Return what was recorded, by version of torch, as in ``2.13``."""
    recorded: dict[str, list[list[Any]]] = json.loads(
        lzma.decompress(RECORDED.read_bytes())
    )
    return recorded


def run() -> list[list[Any]]:
    """Run every part on a fresh process's card and return what each step came to."""
    teller = _Teller()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in (
            _pools_of_graphs,
            _streams,
            _pools_of_users,
            _pools_of_both,
            _without_room,
            _generators,
            _not_allowed,
            _copies,
            _graphed_module,
        ):
            teller.rows.append([f"# {part.__name__}"])
            part(teller)
            torch.cuda.set_stream(torch.cuda.default_stream())
            gc.collect()
            torch.empty(1, device="cuda")  # what waited for other streams is free now
            teller.tell("left")
            torch.cuda.empty_cache()
    return teller.rows


def _pools_of_graphs(teller: _Teller) -> None:
    source = torch.zeros(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        teller.tell("begun")
        result = source + 1
        helper = _bytes(12)
        teller.tell("captured")
        del helper
    teller.tell("ended", list(graph.pool()))
    graph.replay()
    teller.tell("replayed")
    torch.cuda.empty_cache()
    teller.tell("emptied")
    other = torch.cuda.CUDAGraph()
    with torch.cuda.graph(other, pool=graph.pool()):
        shared = _bytes(5)
    teller.tell("shared")
    pool = graph.pool()
    graph.reset()
    torch.cuda.empty_cache()
    teller.tell("one is reset")
    other.reset()
    del shared
    torch.cuda.empty_cache()
    teller.tell("both are reset")

    def sharing() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool):
            pass

    teller.attempt("a pool without users", sharing)
    torch.cuda.set_stream(torch.cuda.default_stream())
    del result
    torch.cuda.empty_cache()
    teller.tell("emptied at last")


def _streams(teller: _Teller) -> None:
    side = torch.cuda.Stream()
    source, used = _bytes(30), _bytes(40)
    used.record_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = _bytes(50)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = torch.add(first, 2)
            teller.tell("forked", torch.cuda.is_current_stream_capturing())
        first.record_stream(side)
        del used, first
        teller.tell("both wait")
        again = _bytes(50)
        torch.cuda.current_stream().wait_stream(side)
        joined = _bytes(50)
        teller.tell("joined")
    teller.tell("ended")
    small = _bytes(1)
    teller.tell("asked again")
    del source, beside, again, joined, small


def _pools_of_users(teller: _Teller) -> None:
    pool = torch.cuda.MemPool()
    teller.tell("made", pool.use_count())
    with torch.cuda.use_mem_pool(pool):
        kept, small, freed = _bytes(4), _bytes(1), _bytes(4)
        del freed
        torch.cuda.empty_cache()
        teller.tell("used", pool.use_count())
        threads = []
        thread = threading.Thread(target=lambda: threads.append(_bytes(3)))
        thread.start()
        thread.join()
        inner = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(inner):
            nested = _bytes(7)
        outer = _bytes(8)
        teller.tell("nested", pool.use_count(), inner.use_count())
    torch.cuda.empty_cache()
    teller.tell("emptied", [s["total_size"] for s in pool.snapshot()])
    del small, pool
    teller.tell("without its object")
    del kept, outer, nested
    teller.tell("without its tensors")
    torch.cuda.empty_cache()
    teller.tell("emptied again")
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.reset_accumulated_memory_stats()
    teller.tell("reset")
    whole = torch.cuda.MemPool(no_split=True)
    with torch.cuda.use_mem_pool(whole):
        large, small = _bytes(3), torch.empty(10, device="cuda")
    teller.tell("not split")
    del large, small


def _pools_of_both(teller: _Teller) -> None:
    pool, inner = torch.cuda.MemPool(), torch.cuda.MemPool()
    handle: Any = pool.id
    first = torch.cuda.CUDAGraph()
    with torch.cuda.graph(first, pool=handle):
        made = _bytes(4)
    teller.tell("captured", pool.use_count())
    kept = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(kept, pool=handle):
        with torch.cuda.use_mem_pool(inner):
            other = torch.add(made, 1)
        result = torch.add(made, 2)
    teller.tell("nested", pool.use_count(), inner.use_count())
    teller.attempt("instantiate", kept.instantiate)
    teller.attempt("replay", kept.replay)
    teller.attempt("instantiate again", kept.instantiate)
    teller.attempt("instantiate the first", first.instantiate)

    def capture_again() -> None:
        with torch.cuda.graph(first, pool=handle):
            torch.add(made, 1)

    teller.attempt("capture again", capture_again)
    teller.tell("left", pool.use_count(), inner.use_count())

    def twice() -> None:
        with torch.cuda.use_mem_pool(inner), torch.cuda.use_mem_pool(inner):
            pass

    teller.attempt("the same pool twice", twice)
    teller.tell("left again", inner.use_count())
    release, end = torch._C._cuda_releasePool, torch._C._cuda_endAllocateToPool
    teller.attempt("release no pool", lambda: release(0, (7, 7)))
    teller.attempt("end no pool", lambda: end(0, (7, 7)))
    del other, result


def _without_room(teller: _Teller) -> None:
    held = _bytes(200)

    def in_a_capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            cached = _bytes(40)
            del cached
            _bytes(8000)

    def in_a_pool() -> None:
        with torch.cuda.use_mem_pool(pool):
            cached = _bytes(30)
            del cached
            _bytes(8000)

    teller.attempt("in a capture", in_a_capture)
    teller.tell("after it")
    teller.attempt("in none", lambda: _bytes(8000))
    teller.tell("after it")
    pool = torch.cuda.MemPool()
    teller.attempt("in a pool", in_a_pool)
    teller.tell("after it", pool.use_count())
    helping = torch.cuda.MemPool(use_on_oom=True)
    with torch.cuda.use_mem_pool(helping):
        large = _bytes(3000)
    del large
    helped = _bytes(2900)
    teller.tell("helped", helping.use_count())
    del helped, held


def _generators(teller: _Teller) -> None:
    own = torch.Generator("cuda")
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(own)
    with torch.cuda.graph(graph):
        drawn = torch.rand(10, device="cuda", generator=own)
        other = torch.rand(10, device="cuda")
        seed = torch.cuda.initial_seed()
        teller.attempt("another seed", lambda: torch.cuda.manual_seed(seed + 1))
        teller.attempt("the same seed", lambda: torch.cuda.manual_seed(seed))
    teller.tell("drawn")
    graph.reset()
    teller.tell("reset")
    stranger = torch.Generator("cuda")

    def unknown() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.rand(3, device="cuda", generator=stranger)

    teller.attempt("an unknown one", unknown)
    teller.attempt("afterwards", lambda: torch.rand(3, device="cuda"))
    del drawn, other


def _not_allowed(teller: _Teller) -> None:
    source = torch.ones(1000, device="cuda")
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    for name in ("replay", "pool", "instantiate"):
        teller.attempt(name, getattr(graph, name))
    teller.attempt("on the default stream", graph.capture_begin)
    teller.attempt(
        "of another mode", lambda: graph.capture_begin(capture_error_mode="loose")
    )

    def recorded() -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    waits: dict[str, Callable[[], Any]] = {
        "item": source[0].item,
        "bool": lambda: bool(source[0]),
        "nonzero": source.nonzero,
        "mask": lambda: source[source > 0],
        "unique": source.unique,
        "allclose": lambda: torch.allclose(source, source + 1),
        "equal": lambda: torch.equal(source, source + 1),
        "equal to itself": lambda: torch.equal(source, source),
        "repeat": lambda: torch.repeat_interleave(source.long()),
        "synchronize": torch.cuda.synchronize,
        "stream": side.synchronize,
        "query": side.query,
        "event": lambda: recorded().query(),
        "wait for an event": lambda: recorded().synchronize(),
        "another stream": lambda: torch.cuda.default_stream().synchronize(),
        "empty the cache": torch.cuda.empty_cache,
    }
    with torch.cuda.stream(side):
        for name, action in waits.items():
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            result = source + 1
            teller.attempt(name, action)
            teller.attempt("compute after it", lambda: torch.add(source, 1))
            teller.attempt("write after it", lambda: source.add_(0))
            teller.attempt("end after it", graph.capture_end)
        teller.attempt("end again", graph.capture_end)
    del result


def _copies(teller: _Teller) -> None:
    source = torch.zeros(1000, device="cuda")
    host, pinned = torch.zeros(1000), torch.zeros(1000).pin_memory()
    copies: dict[str, Callable[[], Any]] = {
        "cpu": source.cpu,
        "tolist": source.tolist,
        "from the host": lambda: source.copy_(host),
        "from the host at once": lambda: source.copy_(host, non_blocking=True),
        "a new tensor": lambda: torch.tensor([1.0], device="cuda"),
        "a number": lambda: source.__setitem__(0, 1.0),
        "filled": lambda: torch.full((2,), 1.0, device="cuda"),
        "from pinned memory at once": lambda: source.copy_(pinned, non_blocking=True),
        "to pinned memory at once": lambda: pinned.copy_(source, non_blocking=True),
        "a new one at once": lambda: pinned.to("cuda", non_blocking=True),
        "from pinned memory": lambda: source.copy_(pinned),
    }
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        for name, action in copies.items():
            teller.attempt(name, action)
        teller.attempt("end", graph.capture_end)


def _graphed_module(teller: _Teller) -> None:
    module = torch.nn.Linear(64, 64, device="cuda")
    sample = torch.ones(8, 64, device="cuda", requires_grad=True)
    with contextlib.suppress(AttributeError):  # workspaces are no matter of graphs
        torch._C._cuda_clearCublasWorkspaces()
    graphed: Any = torch.cuda.make_graphed_callables(module, (sample,))
    teller.tell("graphed")
    given = torch.ones(8, 64, device="cuda", requires_grad=True)
    graphed(given).sum().backward()
    teller.tell("backward")
