"""Ranks of one group as threads of one process, each with a simulated card."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed import multi_threaded_pg

from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable


def run_ranks(
    body: Callable[[int], Any],
    *,
    count: int = 2,
    backend: str | None = "nccl",
    cards: str = "T4*2",
    seconds: float = 20,
    is_bound: bool = False,
) -> list[Any]:
    """Return what each rank returns; the first error of any is raised.

    Args:
        body: What a rank does; it is given its number.
        count: How many ranks there are.
        backend: The backend of the default group.
        cards: The machine; rank N has card N.
        seconds: How long a collective may take.
        is_bound: Whether a rank says its card to ``init_process_group``.
    """
    store = c10d.HashStore()

    def rank(number: int) -> Any:
        torch.cuda.set_device(number % torch.cuda.device_count())
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group(
            backend,
            store=store,
            rank=number,
            world_size=count,
            timeout=timedelta(seconds=seconds),
            device_id=device if is_bound else None,
        )
        try:
            return body(number)
        finally:
            dist.destroy_process_group()

    hook = threading.excepthook
    # Whether a mode is active, which torch has once for all threads.
    modes: Any = torch.utils._python_dispatch
    flags = {key: each for key, each in vars(modes).items() if key.startswith("_is_in")}
    isolate: Any = vars(c10d)["_set_thread_isolation_mode"]
    multi_threaded_pg._install_threaded_pg()
    isolate(True)
    try:
        with simulated_device(cards), ThreadPoolExecutor(count) as pool:
            tasks = [pool.submit(rank, number) for number in range(count)]
            for task in as_completed(tasks):
                task.result()
            return [task.result() for task in tasks]
    finally:
        threading.excepthook = hook
        isolate(False)
        multi_threaded_pg._uninstall_threaded_pg()
        # Each forward and mode puts back what it found; threads do so in another order.
        DistributedDataParallel._active_ddp_module = None
        vars(modes).update(flags)
