"""Makes chosen allocations fail on a real card, with the allocator's own error.

Note [A real OOM at a chosen allocation]
An operator first runs on meta tensors, which shows its new results. If one of them must
fail, the operator runs inside a memory pool whose allocator always returns a null
pointer. The caching allocator then takes all its usual steps (flush, retry, counters,
message) and raises its own error. Interception also applies in the threads that a program
starts, and in work that it gives to thread pools. Autograd passes it to its own threads.

Source for this pool: ``torch.cuda.memory.MemPool`` with
``torch._C._cuda_customAllocator(alloc, free)``. Any C function that returns 0 can be
``alloc``; libc's ``sched_yield`` takes no Python lock.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import _worker  # the function that a pool's threads run
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pytest_gpumem.devices.patches import PatchSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Interceptor(TorchDispatchMode):
    """Calls ``fails`` for every new result on a card before its operator runs.

    Args:
        fails: Takes the device index and bytes; returns whether the allocation must
            fail.
        fail: Runs the operator so that its allocation fails.
        scope: When it is set, ``fails`` is no longer called, because a thread may run
            longer than the ``with`` block.

    Limits: memory that an operator allocates internally (workspaces, temporary tensors) is
    not counted. The results of an operator that cannot run on meta tensors are not counted.
    """

    def __init__(
        self,
        fails: Callable[[int, int], bool],
        fail: Callable[[Callable[[], Any], int], Any],
        scope: threading.Event,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no type hints here
        self._fails = fails
        self._fail = fail
        self._scope = scope

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,  # torch's signature
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        """Run one operator, or make its allocation fail."""
        options = kwargs or {}
        if self._scope.is_set():
            return func(*args, **options)
        for index, nbytes in new_results(func, args, options):
            if self._fails(index, nbytes):
                return self._fail(lambda: func(*args, **options), index)
        return func(*args, **options)


def new_results(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[int, int]]:
    """Return card and bytes of each tensor that an operator will create on a card.

    Args:
        func: The operator.
        args: The positional arguments, as dispatched.
        kwargs: The keyword arguments.
    """
    returns = func._schema.returns  # noqa: SLF001  # no public API
    fresh = [each.alias_info is None for each in returns]
    if not any(fresh):
        return []
    device = kwargs.get("device")
    if device is None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        cards = [tensor.device for tensor in tensors if tensor.is_cuda]
        device = cards[0] if cards else None
    if device is None or torch.device(device).type != "cuda":
        return []
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    try:
        options = dict(kwargs)
        if "device" in options:
            options["device"] = torch.device("meta")
        to_meta = tree_map_only(torch.Tensor, _meta, (args, options))
        made = func(*to_meta[0], **to_meta[1])
    except (RuntimeError, NotImplementedError, TypeError):
        return []
    results = made if isinstance(made, (tuple, list)) else [made]
    return [
        (index, result.untyped_storage().nbytes())
        for result, is_fresh in zip(results, fresh, strict=False)
        if is_fresh
        and isinstance(result, torch.Tensor)
        and result.untyped_storage().nbytes()
    ]


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
    )


def fail_in_null_pool(operator: Callable[[], Any], index: int) -> Any:
    """Run an operator in a memory pool in which every new segment is refused.

    Raises:
        torch.OutOfMemoryError: The allocator's own error.
    """
    torch.cuda.empty_cache()
    address = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    allocator = torch._C._cuda_customAllocator(address, address)  # noqa: SLF001  # see Note [A real OOM at a chosen allocation]
    pool = torch.cuda.MemPool(allocator)
    with torch.cuda.use_mem_pool(pool, device=index):
        return operator()


@contextmanager
def intercepting(
    fails: Callable[[int, int], bool],
    fail: Callable[[Callable[[], Any], int], Any] = fail_in_null_pool,
) -> Iterator[None]:
    """Call ``fails`` before each allocation, in this thread and in threads it starts.

    Args:
        fails: Takes the device index and bytes; returns whether the allocation must
            fail.
        fail: Runs an operator so that its allocation fails.
    """
    scope = threading.Event()
    patches = PatchSet()
    submit, start = ThreadPoolExecutor.submit, threading.Thread.start

    def submitting(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        def inside() -> Any:
            with Interceptor(fails, fail, scope):
                return fn(*args, **kwargs)

        return submit(self, inside)

    def starting(self: threading.Thread) -> None:
        # A pool's worker threads run longer than the ``with`` block. Their work items are
        # handled above.
        if getattr(self, "_target", None) is not _worker:
            run = self.run

            def inside() -> None:
                with Interceptor(fails, fail, scope):
                    run()

            self.run = inside  # type: ignore[method-assign]  # only for this thread
        start(self)

    patches.set(ThreadPoolExecutor, "submit", submitting)
    patches.set(threading.Thread, "start", starting)
    try:
        with Interceptor(fails, fail, scope):
            yield
    finally:
        scope.set()
        patches.restore()
