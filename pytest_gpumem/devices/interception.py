"""Refuse chosen allocations on a real card, with the allocator's own error.

Note [A real OOM at a chosen allocation]
An operator's new results are foreseen by running it on meta tensors. If a rule refuses
one of them, the operator runs inside a memory pool whose allocator always answers
"null": the caching allocator then goes its whole way, flush and retry and counters and
text, and raises its own error. Interception follows a program into the thread pools
that loaders use; autograd's threads carry it along by themselves.

Source for the null pool: ``torch.cuda.memory.MemPool`` over
``torch._C._cuda_customAllocator(alloc, free)``; any C function that returns 0 serves as
``alloc``, and libc's ``sched_yield`` takes no lock of Python's.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
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
        refuses: Device index and bytes in, whether it is to fail out.
        fail: Runs the operator so that its allocation fails.

    Limits: what an operator allocates inside itself (workspaces, temporaries) is not
    numbered; an operator that cannot run on meta tensors is let through unnumbered.
    """

    def __init__(
        self,
        refuses: Callable[[int, int], bool],
        fail: Callable[[Callable[[], Any], int], Any],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._refuses = refuses
        self._fail = fail

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,  # torch's signature
        args: tuple[Any, ...] = (),
        kwargs: Any = None,
    ) -> Any:
        """Run one operator, or make it fail."""
        options = kwargs or {}
        for index, nbytes in new_results(func, args, options):
            if self._refuses(index, nbytes):
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
    refuses: Callable[[int, int], bool],
    fail: Callable[[Callable[[], Any], int], Any] = fail_in_null_pool,
) -> Iterator[None]:
    """Ask before each allocation of a block, in this thread and in thread pools.

    Args:
        refuses: Device index and bytes in, whether it is to fail out.
        fail: How an operator is made to fail.
    """
    patches = PatchSet()
    submit = ThreadPoolExecutor.submit

    def submitting(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        def inside() -> Any:
            with Interceptor(refuses, fail):
                return fn(*args, **kwargs)

        return submit(self, inside)

    patches.set(ThreadPoolExecutor, "submit", submitting)
    try:
        with Interceptor(refuses, fail):
            yield
    finally:
        patches.restore()
