"""Real CUDA cards, through ``torch.cuda``.

Note [A budget on a real card]
Only PyTorch's allocator knows PyTorch's cap (``set_per_process_memory_fraction``). While a
budget applies, the few functions that report free memory to Python are wrapped: free
bytes are at most those that the budget still allows. A fraction that user code sets is
limited to the budget. Everything is restored when the last budget is removed.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.budgets import Budgets
from pytest_gpumem.devices.cuda_history import CudaHistory, history_of_block
from pytest_gpumem.devices.cuda_statistics import CudaStatistics, CudaTracker
from pytest_gpumem.devices.fractions import fraction_for
from pytest_gpumem.devices.nvml import CardCount, Reading, cap_free_memory
from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.guards import Guarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class CudaDevice:
    """Implements the ``Device`` protocol with the machine's CUDA cards.

    Limits: single allocations cannot be watched. An allocation can be made to fail only in
    operators that are dispatched from threads visible to Python (see ``interception.py``).
    """

    kind = "cuda"

    def __init__(self) -> None:
        self._statistics = CudaStatistics()
        self._budgets: defaultdict[int, Budgets] = defaultdict(Budgets)
        self._fractions: dict[int, float] = {}
        self._lock = threading.RLock()
        self._patches = PatchSet()
        self._oom_observers: list[Callable[[int, int], None]] = []
        self._observes = False
        self._counts: dict[int, CardCount] = {}
        self._nvml_hook = AfterImport("pynvml", self._cap_nvml)

    @property
    def device_count(self) -> int:
        """The number of cards."""
        return torch.cuda.device_count()

    @property
    def num_requests(self) -> int:
        """The number of allocations requested so far on all cards, also of failed ones."""
        return sum(
            sum(self._statistics.counts(index)[:2])
            for index in range(self.device_count)
        )

    def name(self, index: int) -> str:
        """Return a card's name."""
        return torch.cuda.get_device_name(index)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        """Return free and total bytes; a budget limits the free bytes."""
        return torch.cuda.mem_get_info(index)

    def total_bytes(self, index: int) -> int:
        """Return a card's total bytes, without creating a context."""
        total: int = torch.cuda.get_device_properties(index).total_memory
        return total

    def card_id(self, index: int) -> str:
        """Return a card's UUID."""
        return f"GPU-{torch.cuda.get_device_properties(index).uuid}"

    def context_bytes(self, index: int) -> int:
        """Return the bytes that this process holds on the card outside the allocator."""
        process = self.counted(index).process_bytes
        return max((process or 0) - self._reserved(index), 0)

    def others_bytes(self, index: int) -> int:
        """Return the bytes of a card that other processes hold."""
        cudart: Any = torch.cuda.cudart()
        module = cudart.original if isinstance(cudart, _Cudart) else cudart
        free, total = module.cudaMemGetInfo(index)
        own = self._reserved(index) + self.context_bytes(index)
        others: int = max(total - free - own, 0)
        return others

    def _reserved(self, index: int) -> int:
        return self.memory_stats(index).get("reserved_bytes.all.current", 0)

    def memory_stats(self, index: int) -> Mapping[str, int]:
        """Return ``torch.cuda.memory_stats``; empty before CUDA is used."""
        return self._statistics.of(index)

    def counted(self, index: int) -> Reading:
        """Return NVML's present bytes; 0 before this process uses the card."""
        if not _has_context(index):
            return Reading(0, None)
        if index not in self._counts:
            self._counts[index] = CardCount(index, lambda: _has_context(index))
        return self._counts[index].read()

    def empty_cache(self) -> None:
        """Free cuBLAS workspaces and cached segments of every card."""
        if torch.cuda.is_initialized():
            torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001  # no public API
            torch.cuda.empty_cache()

    def segments(self, index: int) -> list[dict[str, Any]]:
        """Return a card's segments.

        Limits: if PyTorch's memory history is recorded, it gets an entry for this call.
        """
        every: Any = torch.cuda.memory_snapshot()
        return [each for each in every if each["device"] == index]

    def holds(self, storage: Any, index: int) -> bool:
        """Return whether a storage is on a card."""
        device: torch.device = storage.device
        return device.type == "cuda" and device.index == index

    def open_tracker(self, index: int) -> CudaTracker:
        """Start tracking a card's peaks."""
        return CudaTracker(self._statistics, index, self.counted)

    def restore(self) -> None:
        """Restore torch's statistics; see Note [Peaks of user code]."""
        self._statistics.restore()

    # -- budget -------------------------------------------------------------------

    def budget(self, index: int) -> int | None:
        """Return the smallest budget that applies on a card, or None."""
        return self._budgets[index].smallest

    def set_budget(
        self, index: int, budget_bytes: int | None, *, owner: object = None
    ) -> None:
        """Cap a card for an owner (inclusive); None removes the owner's cap.

        See Note [A budget on a real card].

        Raises:
            BudgetError: The budget is not between 1 byte and the card's total.
        """
        if budget_bytes is None and not self._has_budgets:
            return  # CUDA is not used, because it would read the variables that hide cards
        with self._lock:
            had_any = self._has_budgets
            self._budgets[index].put(
                owner,
                budget_bytes,
                total_bytes=torch.cuda.get_device_properties(index).total_memory,
                index=index,
                name=self.name(index),
            )
            if self._has_budgets and not had_any:
                self._patch()
            if self._has_budgets or had_any:
                self._apply(index)
            if had_any and not self._has_budgets:
                self._nvml_hook.stop()
                self._patches.restore()
        smallest = self.budget(index)
        if smallest is not None and self._reserved(index) > smallest:
            # Cached segments would serve requests even beyond the cap.
            self.empty_cache()

    @property
    def _has_budgets(self) -> bool:
        return any(each.smallest is not None for each in self._budgets.values())

    def _apply(self, index: int) -> None:
        total = torch.cuda.get_device_properties(index).total_memory
        fraction = self._fractions.get(index, 1.0)
        budget = self.budget(index)
        if budget is not None:
            fraction = min(fraction, fraction_for(budget, total))
        self._set_fraction(fraction, index)

    _set_fraction: Callable[[float, int], None] = staticmethod(
        lambda fraction, index: torch._C._cuda_setMemoryFraction(fraction, index)  # noqa: SLF001, PLW0108  # looked up at the call, because it is patched
    )

    def _patch(self) -> None:
        torch.cuda.init()
        original = torch._C._cuda_setMemoryFraction  # noqa: SLF001  # the function behind torch.cuda
        self._set_fraction = original
        # A fraction that user code has set before applies together with the budgets, and
        # again after them.
        get: Any = getattr(torch._C, "_cuda_getMemoryFraction", None)  # noqa: SLF001  # missing in older versions
        cards = range(self.device_count if get is not None else 0)
        self._fractions.update({index: get(index) for index in cards})
        patches = self._patches
        patches.set(torch._C, "_cuda_setMemoryFraction", self._user_fraction)  # noqa: SLF001  # the function behind torch.cuda
        patches.set(
            torch._C,  # noqa: SLF001  # the function behind torch.cuda
            "_cuda_getMemoryFraction",
            lambda index: self._fractions.get(index, 1.0),
        )
        patches.set(torch.cuda, "_cudart", _Cudart(torch.cuda.cudart(), self))
        self._nvml_hook.start()
        info = getattr(torch._C, "_accelerator_getMemoryInfo", None)  # noqa: SLF001  # the function behind torch.accelerator
        if info is not None:
            patches.set(
                torch._C,  # noqa: SLF001  # the function behind torch.accelerator
                "_accelerator_getMemoryInfo",
                lambda index: self.shared(index, *info(index)),
            )

    def _cap_nvml(self) -> None:
        cap_free_memory(sys.modules["pynvml"], self._patches, self.shared)

    def _user_fraction(self, fraction: float, index: int) -> None:
        self._fractions[index] = fraction
        self._apply(index)

    def shared(self, index: int, free: int, total: int) -> tuple[int, int]:
        """Return free and total bytes under the budget, as a shared card reports them."""
        budget = self.budget(index)
        if budget is not None:
            free = min(free, max(budget - self._reserved(index), 0))
        return free, total

    def block_address(self, storage: Any) -> int | None:
        """Return the address of a storage's block; None for a storage on the host."""
        address: int = storage.data_ptr()
        return address if storage.device.type == "cuda" else None

    def block_bytes(self, storage: Any) -> int:
        """Return the bytes of a storage's block, from a snapshot.

        Limits: a snapshot reads every block. Do not call this method for many storages.
        """
        address = storage.data_ptr()
        for segment in torch.cuda.memory_snapshot():
            if (
                segment["address"]
                <= address
                < segment["address"] + segment["total_size"]
            ):
                for block in segment["blocks"]:
                    if block["address"] == address:
                        nbytes: int = block["size"]
                        return nbytes
        return 0

    # -- single allocations ---------------------------------------------------------

    def fail_allocation(self, index: int, nbytes: int) -> str:
        """Fail a request as the allocator does; return the error message."""
        from pytest_gpumem.devices.interception import (
            fail_in_null_pool,
        )

        try:
            fail_in_null_pool(
                lambda: torch.empty(
                    nbytes, dtype=torch.uint8, device=torch.device("cuda", index)
                ),
                index,
            )
        except torch.OutOfMemoryError as error:
            return str(error)
        raise AssertionError("unreachable: a null pool serves nothing")

    @contextmanager
    def failing(self, fails: Callable[[int, int], bool]) -> Iterator[None]:
        """Call ``fails`` before each operator to decide whether its allocation must fail."""
        from pytest_gpumem.devices.interception import (
            intercepting,
        )

        with intercepting(fails):
            yield

    @contextmanager
    def observing_ooms(self, observe: Callable[[int, int], None]) -> Iterator[None]:
        """Call ``observe`` after each failed request.

        Torch cannot remove an observer, so one observer is used for all ``with`` blocks. It
        can be attached only after CUDA is initialised.
        """
        if not self._oom_observers and not self._observes:
            self._observes = True
            torch.cuda._lazy_call(self._attach)  # noqa: SLF001  # now, or when CUDA is initialised
        observer = Guarded(observe)
        self._oom_observers.append(observer)
        try:
            yield
        finally:
            self._oom_observers.remove(observer)

    def _attach(self) -> None:
        attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer")  # noqa: B009, SLF001  # missing in the stubs
        attach(self._tell_oom)

    def _tell_oom(self, index: int, nbytes: int, _limit: int, _free: int) -> None:
        for observe in list(self._oom_observers):
            observe(index, nbytes)

    @contextmanager
    def watching(
        self,
        watch: Callable[[int, int, int], Callable[[int], None] | None],  # noqa: ARG002  # the protocol's signature
    ) -> Iterator[bool]:
        """Do nothing: a real allocator does not report single allocations to Python."""
        yield False

    @contextmanager
    def tracing(
        self,
        trace: Callable[[int, int, int, int, int], None],  # noqa: ARG002  # the protocol's signature
    ) -> Iterator[bool]:
        """Do nothing: a real allocator does not report single changes to Python."""
        yield False

    @contextmanager
    def recording(self) -> Iterator[CudaHistory | None]:
        """Make torch record its memory history inside a block, after CUDA is initialised."""
        with history_of_block() as history:
            yield history


def _has_context(index: int) -> bool:
    """Return whether this process has a context on a card, without creating one.

    On a card that the process does not see it has none; torch's function raises there.

    Source: ``hasPrimaryContext`` in ``aten/src/ATen/cuda/detail/CUDAHooks.cpp``.
    """
    if not torch.cuda.is_initialized() or index >= torch.cuda.device_count():
        return False
    has_context: Any = getattr(torch._C, "_cuda_hasPrimaryContext", None)  # noqa: SLF001  # no public API; missing in CPU builds
    return has_context is None or bool(has_context(index))


class _Cudart:
    """Torch's CUDA runtime module, with ``cudaMemGetInfo`` limited by the budget."""

    def __init__(self, module: Any, device: CudaDevice) -> None:
        self.original = module
        self._device = device

    def cudaMemGetInfo(self, index: int) -> tuple[int, int]:  # noqa: N802  # the runtime's name
        return self._device.shared(index, *self.original.cudaMemGetInfo(index))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)
