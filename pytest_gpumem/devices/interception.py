"""Refuse chosen allocations on a real card, with the allocator's own error.

Note [A real OOM at a chosen allocation]
An operator's new results are foreseen by running it on meta tensors. If a rule fails
one of them, the operator runs inside a memory pool whose allocator always answers
"null": the caching allocator then goes its whole way, flush and retry and counters and
text, and raises its own error. Interception follows a program into the threads that it
starts and the work that it gives to thread pools; autograd's threads carry it along by
themselves.

Source for the null pool: ``torch.cuda.memory.MemPool`` over
``torch._C._cuda_customAllocator(alloc, free)``; any C function that returns 0 serves as
``alloc``, and libc's ``sched_yield`` takes no lock of Python's.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import _worker  # what a pool's threads run
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pytest_gpumem.devices.patches import PatchSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Interceptor(TorchDispatchMode):
    """Asks about every new result on a card before its operator runs.

    Args:
        fails: Device index and bytes in, whether it is to fail out.
        fail: Runs the operator so that its allocation fails.
        scope: Once it is set, nothing is asked any more: a thread may outlive the block.

    Limits: what an operator allocates inside itself (workspaces, temporaries) is not
    numbered; an operator that cannot run on meta tensors is let through unnumbered.
    """

    def __init__(
        self,
        fails: Callable[[int, int], bool],
        fail: Callable[[Callable[[], Any], int], Any],
        scope: threading.Event,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
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
        """Run one operator, or make it fail."""
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
    """Return card and bytes of each tensor that an operator will make on a card.

    Args:
        func: The operator.
        args: Its arguments, as dispatched.
        kwargs: Its keyword arguments.
    """
    returns = func._schema.returns  # noqa: SLF001  # the schema has no public name
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
    """Run an operator where every new segment is refused.

    Raises:
        torch.OutOfMemoryError: The allocator's own.
    """
    torch.cuda.empty_cache()
    address = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    allocator = torch._C._cuda_customAllocator(address, address)  # noqa: SLF001  # see the module's note
    pool = torch.cuda.MemPool(allocator)
    with torch.cuda.use_mem_pool(pool, device=index):
        return operator()


@contextmanager
def intercepting(
    fails: Callable[[int, int], bool],
    fail: Callable[[Callable[[], Any], int], Any] = fail_in_null_pool,
) -> Iterator[None]:
    """Ask before each allocation of a block, in this thread and in those it starts.

    Args:
        fails: Device index and bytes in, whether it is to fail out.
        fail: How an operator is made to fail.
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
        # A pool's workers live longer than the block; their work is seen to above.
        if getattr(self, "_target", None) is not _worker:
            run = self.run

            def inside() -> None:
                with Interceptor(fails, fail, scope):
                    run()

            self.run = inside  # type: ignore[method-assign]  # of this thread alone
        start(self)

    patches.set(ThreadPoolExecutor, "submit", submitting)
    patches.set(threading.Thread, "start", starting)
    try:
        with Interceptor(fails, fail, scope):
            yield
    finally:
        scope.set()
        patches.restore()
