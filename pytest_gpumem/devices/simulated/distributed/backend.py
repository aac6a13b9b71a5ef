"""The substitute for NCCL in torch's process groups, which uses gloo.

Sources of names, options and messages:
``torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp`` and ``.hpp``, and ``init.cpp`` for
their Python bindings.

Note [Shelves]
A collective that does not run on the caller's stream keeps its inputs and outputs alive
until the caller has waited, or else until the next collective: the group's watchdog
sees that the first one has ended, and the next call then releases the tensors. Code
that uses only the work's future does not wait: the last bucket of
DistributedDataParallel stays on the card after its module is deleted. On a card the
watchdog looks ten times a second, and until then other collectives free nothing. Here
every collective frees the tensors that earlier collectives have kept.

Source: ``collective``, ``workEnqueue``, ``endCoalescing``, ``WorkNCCL::synchronizeStream``
and ``Watchdog::runLoop`` of ``ProcessGroupNCCL.cpp``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import socket
import threading
from collections import deque
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d
from torch.distributed import constants, distributed_c10d

from pytest_gpumem.devices.simulated.distributed.works import (
    NcclWork,
    idle_work,
    nccl_error,
)
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.memory import Memory
from pytest_gpumem.devices.simulated.torch_build import NCCL_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.devices.simulated.card import SimulatedCard

#: Source: ``kProcessGroupNCCLDefaultTimeout``.
DEFAULT_TIMEOUT: Final = timedelta(minutes=10)
_UNSET: Final = -(2**31)  # NCCL_CONFIG_UNDEF_INT
#: The number of works without a waiting caller that are kept; then the oldest is dropped.
_KEPT: Final = 64
#: The prefix of the store's keys under which ranks publish their calls, and how many calls
#: are kept.
_CALLS: Final = "calls"
_KEPT_CALLS: Final = 64

_gloo: Final[Any] = getattr(c10d, "ProcessGroupGloo", object)
_uids: Final = itertools.count()


class _Buffers:
    """The memory that a communicator holds on a card outside PyTorch's allocator.

    Raises:
        torch.distributed.DistBackendError: The card has no room.
    """

    def __init__(self, card: SimulatedCard) -> None:
        self._card = card
        self._address: int | None = None
        nbytes = card.card.nccl_bytes
        if not nbytes:
            return
        self._address = card.take_beside(nbytes)
        if self._address is None:
            # Source: ``ncclCudaMallocDebug`` of NCCL's ``alloc.h``.
            raise nccl_error(
                "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
                "ncclUnhandledCudaError: Call to CUDA function failed.",
                f"Failed to CUDA calloc {nbytes} bytes",
            )

    def close(self) -> None:
        """Free the memory; may be called twice."""
        address, self._address = self._address, None
        if address is not None:
            self._card.give_back(address)


class NCCLConfig:
    """``ncclConfig_t``: it is accepted and stored, without any effect."""

    def __init__(self) -> None:
        self.blocking = _UNSET
        self.cga_cluster_size = _UNSET
        self.min_ctas = _UNSET
        self.max_ctas = _UNSET
        self.net_name: str | None = None
        self.split_share = _UNSET
        self.traffic_class = _UNSET
        self.comm_name: str | None = None
        self.collnet_enable = _UNSET
        self.cta_policy = _UNSET
        self.shrink_share = _UNSET
        self.nvls_ctas = _UNSET
        self.nchannels_per_net_peer = _UNSET
        self.nvlink_centric_sched = _UNSET


class NcclOptions(c10d.Backend.Options):
    """``ProcessGroupNCCL.Options``."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:  # noqa: FBT001, FBT002  # torch's signature
        super().__init__("nccl", DEFAULT_TIMEOUT)
        self.is_high_priority_stream = is_high_priority_stream
        self.config = NCCLConfig()
        self.split_from: NcclBackend | None = None
        self.split_color = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> NcclOptions:
        """Return a copy; ``split_group`` needs one."""
        new = NcclOptions(self.is_high_priority_stream)
        new._timeout = self._timeout
        new.config = copy.deepcopy(self.config, memo)
        new.global_ranks_in_group = self.global_ranks_in_group
        new.group_name = self.group_name
        new.split_from, new.split_color = self.split_from, self.split_color
        return new


class NcclBackend(_gloo):  # type: ignore[misc]  # the base is a C++ class
    """NCCL in a process group: NCCL's rules with gloo's transport.

    Args:
        store: The store through which the ranks find each other.
        rank: This process's rank in the group.
        size: The number of ranks.
        options: ``ProcessGroupNCCL.Options``, or a timeout.
    """

    Options: ClassVar[type[NcclOptions]] = NcclOptions
    NCCLConfig: ClassVar = NCCLConfig
    NCCL_CTA_POLICY_DEFAULT: ClassVar = 0
    NCCL_CTA_POLICY_EFFICIENCY: ClassVar = 1
    NCCL_CTA_POLICY_ZERO: ClassVar = 2

    supports_splitting = True
    supports_coalescing = True
    supports_time_estimate = False
    supports_shrinking = False
    #: Whether collectives keep their tensors until a caller has waited.
    has_shelves: ClassVar = True
    #: Whether barriers use a number that the group always holds on the card.
    keeps_a_barrier_buffer: ClassVar = False

    def __init__(
        self,
        store: c10d.Store,
        rank: int,
        size: int,
        options: NcclOptions | timedelta | None = None,
        *,
        timeout: timedelta | None = None,
    ) -> None:
        if not torch.cuda.device_count():
            raise ValueError(
                "ProcessGroupNCCL is only supported with GPUs, no GPUs found!"
            )
        if not isinstance(options, NcclOptions):
            timeout = options or timeout
            options = NcclOptions()
            if timeout is not None:
                options._timeout = timeout
        super().__init__(
            c10d.PrefixStore("gloo", store), rank, size, timeout=options._timeout
        )
        self._store = c10d.PrefixStore("nccl", store)
        self._options = options
        self._uid = next(_uids)
        self._lock = threading.RLock()
        self._communicators: dict[int, _Buffers] = {}
        self._sequence = 0
        #: Collectives so far, without sends and receives.
        self._num_calls = 0
        self._extra_timeout = timedelta(0)
        self._works: deque[NcclWork] = deque()
        #: The tensors of collectives for which no caller has waited.
        self._shelves: list[list[object]] = []
        self._shelf_together: list[object] = []
        #: Works between ``_start_coalescing`` and ``_end_coalescing``.
        self._together: list[dist.Work] | None = None
        self._num_splits = 0

    # -- methods that torch's Python code calls ---------------------------------------

    @property
    def options(self) -> NcclOptions:
        """The options with which the group was created."""
        return self._options

    @property
    def uid(self) -> int:
        """The group's number in this process."""
        return self._uid

    def name(self) -> str:
        """Return the backend's name."""
        return "nccl"

    _get_backend_name = name

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self._options._timeout = timeout
        super()._set_default_timeout(timeout)

    set_timeout = _set_default_timeout

    def _add_ephemeral_timeout(self, timeout: timedelta) -> None:
        self._extra_timeout += timeout

    def _verify_work_timeout(self, work: NcclWork, timeout: timedelta) -> bool:
        return work.timeout == timeout

    def _is_initialized(self) -> bool:
        return bool(self._communicators)

    def _group_start(self) -> None:
        """Begin calls that NCCL combines; here each call runs immediately."""

    _group_end = _group_start

    def comm_split_count(self) -> int:
        """Return the number of groups that were split from this one."""
        return self._num_splits

    def perform_nocolor_split(self, device: torch.device) -> None:
        """Take part in a split that creates a group without this rank."""

    def register_mem_pool(self, pool: object, symm: bool = False) -> None:  # noqa: FBT001, FBT002  # torch's signature
        """Accept a pool whose memory NCCL may use without copies; no bytes change."""

    deregister_mem_pool = register_mem_pool

    def eager_connect_single_device(self, device: torch.device) -> None:
        """Create the communicator of a card now."""
        self.connect(card_of(device.index))

    def close(self) -> None:
        """Free the group's memory, and drop its works in progress."""
        for each in self._communicators.values():
            each.close()
        self._communicators.clear()
        self._works.clear()
        self._clear_shelves()

    def abort(self) -> None:
        """End the group and its works in progress."""
        self.close()
        super().abort()

    def shutdown(self) -> None:
        """End the group."""
        self.abort()

    @staticmethod
    def get_build_nccl_version() -> tuple[int, int, int]:
        """Return the version of NCCL that torch was built with."""
        return NCCL_VERSION

    get_runtime_nccl_version = get_build_nccl_version

    # -- communicators ------------------------------------------------------------------

    def connect(self, card: SimulatedCard) -> None:
        """Create the communicator of a card together with the other ranks, only once.

        Raises:
            torch.distributed.DistBackendError: Two ranks use the same card, another rank
                does not respond, or the card has no room for the buffers.
        """
        with self._lock:
            if card.index in self._communicators:
                return
            self._meet(card)
            self._communicators[card.index] = _Buffers(card)

    def _meet(self, card: SimulatedCard) -> None:
        """Exchange the cards of all ranks.

        Source: ``broadcastUniqueNCCLID`` of ``ProcessGroupNCCL.cpp``, and
        ``initTransportsRank`` of NCCL's ``init.cc``.
        """
        rank, size, number = self.rank(), self.size(), len(self._communicators)
        if size == 1:
            return
        # A bus number in NCCL's format, which is different for each card of a machine.
        own = f"{socket.gethostname()} {card.number << 12:x}"
        self._store.set(f"{number}/{rank}", own)
        for other in range(size):
            key = f"{number}/{other}"
            try:
                self._store.wait([key], self._options._timeout)
            except RuntimeError as error:
                raise dist.DistBackendError(
                    f"[{rank}] is setting up NCCL communicator and retrieving "
                    f"ncclUniqueId from [{other}] via c10d key-value store by key "
                    f"'{number}', but store->get('{number}') got error: {error}. This "
                    f"may indicate a possible application crash on rank {other} or a "
                    "network set up issue."
                ) from None
            if other != rank and self._store.get(key).decode() == own:
                raise nccl_error(
                    "invalid usage (run with NCCL_DEBUG=WARN for details)",
                    "ncclInvalidUsage: This usually reflects invalid usage of NCCL "
                    "library.",
                    f"Duplicate GPU detected : rank {rank} and rank {other} both on "
                    f"CUDA device {own.split()[1]}",
                )

    # -- collectives ----------------------------------------------------------------

    def timeout_of(self, milliseconds: int) -> timedelta:
        """Return the timeout of a collective from milliseconds; -1 means the group's."""
        if milliseconds >= 0:
            return timedelta(milliseconds=milliseconds)
        extra, self._extra_timeout = self._extra_timeout, timedelta(0)
        return self._options._timeout + extra

    def agree(self, fingerprint: str) -> Callable[[], str]:
        """Compare a collective with those that the other ranks have called so far.

        The last rank to call sees the calls of all others. NCCL would wait for ever, or
        mix up values.

        Args:
            fingerprint: The facts that must be the same on all ranks.

        Returns:
            A function that compares again, and returns the difference as text, or
            nothing.

        Raises:
            torch.distributed.DistBackendError: Another rank has called another
                collective, or one of other sizes (the text of ``ProcessGroupWrapper``).
        """
        self._num_calls += 1
        number = self._num_calls
        own = f"SequenceNumber={number}, {fingerprint}"
        # The closure does not refer to the group. Otherwise the group could be deleted in
        # one of its own threads, which cannot wait for its own end.
        store, rank, size = self._store, self.rank(), self.size()

        def differing() -> str:
            for other in range(size):
                key = f"{_CALLS}/{number % _KEPT_CALLS}/{other}"
                # The process of the store may have ended.
                with suppress(RuntimeError):
                    if other == rank or not store.check([key]):
                        continue
                    said = store.get(key).decode()
                    if said != own and said.startswith(f"SequenceNumber={number}, "):
                        return (
                            "Detected mismatch between collectives on ranks. Rank "
                            f"{rank} is running collective: CollectiveFingerPrint({own}), "
                            f"but Rank {other} is running collective: "
                            f"CollectiveFingerPrint({said})."
                        )
            return ""

        with suppress(RuntimeError):
            store.set(f"{_CALLS}/{number % _KEPT_CALLS}/{rank}", own)
        found = differing()
        if found:
            raise dist.DistBackendError(found)
        return differing

    def transport(self, name: str, *args: Any) -> dist.Work:
        """Send values with gloo."""
        carry: Callable[..., dist.Work] = getattr(super(), name)
        return carry(*args)

    def start(
        self, what: str, stashed: Sequence[object] = (), **details: Any
    ) -> dist.Work:
        """Return the work of a collective whose values are being sent.

        Args:
            what: Torch's name of the collective.
            stashed: The tensors that the group keeps alive, see Note [Shelves].
            details: Arguments of ``NcclWork``.
        """
        self._sequence += 1
        shelf = list(stashed) if self.has_shelves else []
        work = NcclWork(
            what, rank=self.rank(), sequence=self._sequence, shelf=shelf, **details
        )
        if self._together is not None:
            self._together.append(work)
            self._shelf_together += shelf
            return idle_work()
        self._enqueue(shelf)
        return self._kept(work)

    def _enqueue(self, shelf: list[object]) -> None:
        self._clear_shelves()
        if shelf and not current_machine().captures:
            self._shelves.append(shelf)

    def _clear_shelves(self) -> None:
        for each in self._shelves:
            each.clear()
        self._shelves.clear()

    def _kept(self, work: NcclWork) -> NcclWork:
        """Keep a work's Python object alive until a caller has waited; C++ does not."""
        works = self._works
        if len(works) > _KEPT and works[0].look():
            works.popleft()
        works.append(work)
        work.released = self._forget
        return work

    def _forget(self, work: NcclWork) -> None:
        with suppress(ValueError):  # it was dropped because there were too many
            self._works.remove(work)

    def start_coalescing(self) -> None:
        """Combine the following collectives into one."""
        self._together, self._shelf_together = [], []

    def end_coalescing(self) -> dist.Work | None:
        """Return the work of all collectives since ``start_coalescing``."""
        together, self._together = self._together, None
        shelf, self._shelf_together = self._shelf_together, []
        if not together:
            return None
        self._enqueue(shelf)
        return self._kept(
            NcclWork(
                "COALESCED",
                rank=self.rank(),
                sequence=self._sequence,
                timeout=self._options._timeout,
                inner=together,
                shelf=shelf,
            )
        )

    def note_split(self) -> None:
        """Count a group that was split from this one."""
        self._num_splits += 1

    def split_off(
        self, store: c10d.Store, rank: int, size: int, options: NcclOptions
    ) -> NcclBackend:
        """Return the backend of a group that is split from this one."""
        return type(self)(store, rank, size, options)

    @staticmethod
    def wrong_card(bound: torch.device, card: SimulatedCard) -> Exception:
        """Return the error for a tensor that is not on the group's card."""
        del bound, card
        return dist.DistBackendError(
            "Attempt to perform collective on tensor not on device passed to "
            "init_process_group"
        )


class ProcessGroupNCCL(NcclBackend):
    """``ProcessGroupNCCL``: the backend ``nccl`` up to torch 2.14, then ``nccl-legacy``."""


class _OneCardBackend(NcclBackend):
    """NCCL for one card; it connects as soon as the card is known.

    Source: ``torch/csrc/distributed/c10d/nccl2/ProcessGroupNCCL.cpp`` and
    ``ProcessGroupNCCLBackend.cpp``.

    Limits: Other errors have the texts of ``ProcessGroupNCCL``. Tensors of collectives
        are not kept until a caller has waited.

    Args:
        store: The store through which the ranks find each other.
        rank: This process's rank in the group.
        size: The number of ranks.
        options: ``ProcessGroupNCCL.Options``.
        device_id: The group's card; None means the card of the first collective.
    """

    keeps_a_barrier_buffer: ClassVar = True
    has_shelves: ClassVar = False

    def __init__(
        self,
        store: c10d.Store,
        rank: int,
        size: int,
        options: NcclOptions | None = None,
        device_id: torch.device | None = None,
    ) -> None:
        super().__init__(store, rank, size, options)
        #: One float32 from PyTorch's allocator.
        self._barrier_buffer: Memory | None = None
        self._device = device_id
        if device_id is not None:
            self.connect(card_of(device_id.index))

    def connect(self, card: SimulatedCard) -> None:
        super().connect(card)
        if self._barrier_buffer is None:
            self._device = torch.device("cuda", card.index)
            self._barrier_buffer = Memory(card, torch.float32.itemsize)

    def close(self) -> None:
        self._barrier_buffer = None
        super().close()

    def split(
        self, store: c10d.Store, ranks: Sequence[int], options: NcclOptions
    ) -> NcclBackend | None:
        """Return the backend of a group with some of the ranks; None on any other rank."""
        self.note_split()
        if self.rank() not in ranks:
            return None
        return self.split_off(store, ranks.index(self.rank()), len(ranks), options)

    def split_off(
        self, store: c10d.Store, rank: int, size: int, options: NcclOptions
    ) -> NcclBackend:
        return type(self)(store, rank, size, options, self._device)

    @staticmethod
    def wrong_card(bound: torch.device, card: SimulatedCard) -> Exception:
        return RuntimeError(
            f"ProcessGroupNCCL is bound to device {bound} but an operation was issued "
            f"on cuda:{card.index}"
        )


class ProcessGroupNCCL2(_OneCardBackend):
    """``ProcessGroupNCCL2``: the backends ``nccl2`` and, from torch 2.15 on, ``nccl``."""


class ProcessGroupNCCLLazy(_OneCardBackend):
    """``ProcessGroupNCCLLazy``: the backend ``nccl-lazy``."""


#: The classes that the installed torch has.
_CLASSES: Final[list[type[NcclBackend]]] = [ProcessGroupNCCL]
if hasattr(distributed_c10d, "_create_nccl2_process_group"):
    _CLASSES.extend((ProcessGroupNCCL2, ProcessGroupNCCLLazy))
for _each in _CLASSES:
    _each.__module__ = "torch.distributed.distributed_c10d"


# -- process groups -----------------------------------------------------------------------

_group_class: Final[Any] = c10d.ProcessGroup
_wrap: Final[Any] = vars(distributed_c10d)["_create_process_group_wrapper"]
#: The backends of each group, by device type. C++ keeps the backends alive, but not
#: their Python objects.
_backends: Final[WeakKeyDictionary[Any, dict[str, Any]]] = WeakKeyDictionary()


def backend_of(group: Any) -> NcclBackend | None:
    """Return the substitute for NCCL in a group, or None."""
    found = _backends.get(group, {}).get("cuda")
    return found if isinstance(found, NcclBackend) else None


def _register_backend(
    self: Any, device: torch.device, backend_type: Any, backend: Any = None
) -> None:
    _original["_register_backend"](self, device, backend_type, backend)
    _backends.setdefault(self, {})[device.type] = backend


def _wrapped(wrapped_pg: Any, *args: Any, **options: Any) -> Any:
    """Prevent ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` from wrapping a Python backend in C++."""
    if isinstance(wrapped_pg, NcclBackend):
        return wrapped_pg
    return _wrap(wrapped_pg, *args, **options)


def _start_coalescing(self: Any, device_type: torch.device) -> None:
    backend = backend_of(self) if device_type.type == "cuda" else None
    if backend is None:
        _original["_start_coalescing"](self, device_type)
    else:
        backend.start_coalescing()


def _end_coalescing(self: Any, device_type: torch.device) -> Any:
    backend = backend_of(self) if device_type.type == "cuda" else None
    if backend is None:
        return _original["_end_coalescing"](self, device_type)
    return backend.end_coalescing()


def _ending(name: str) -> Any:
    """Return a function that ends a group: C++ does not call a backend's Python methods."""

    def end(self: Any) -> None:
        backend = backend_of(self)
        if backend is not None:
            backend.close()
        _original[name](self)

    return end


def _split_group(  # noqa: PLR0917  # torch's signature
    self: Any,
    ranks: Sequence[int],
    timeout: timedelta | None = None,
    opts: Any = None,
    group_name: str | None = None,
    group_desc: str | None = None,
    device_types: Sequence[torch.device] | None = None,
) -> Any:
    """Return a new group with some of a group's ranks; None on any other rank.

    Source: ``ProcessGroup::splitGroup`` of ``ProcessGroup.cpp``.
    """
    parent = backend_of(self)
    if parent is None:
        given = {} if device_types is None else {"device_types": device_types}
        return _original["split_group"](
            self, ranks, timeout, opts, group_name, group_desc, **given
        )
    parent.note_split()
    ordered = sorted(ranks)
    if self.rank() not in ordered:
        return None
    name = group_name or f"{self.group_name}:split:{ordered}"
    store = c10d.PrefixStore(f"{name}/", self.get_group_store())
    rank, size = ordered.index(self.rank()), len(ordered)
    group = _group_class(store, rank, size)
    group._set_default_backend(_group_class.BackendType.NCCL)
    types = {each.type for each in device_types} if device_types is not None else None
    limit = timeout or parent.options._timeout
    for type_, backend in _backends[self].items():
        if types is not None and type_ not in types:
            continue
        own_store = c10d.PrefixStore(f"{type_}/", store)
        if isinstance(backend, NcclBackend):
            options = copy.deepcopy(
                opts if isinstance(opts, NcclOptions) else NcclOptions()
            )
            options._timeout = limit
            options.group_name = cast("Any", name)
            new: Any = backend.split_off(own_store, rank, size, options)
            kind = _group_class.BackendType.NCCL
        else:
            new = _gloo(own_store, rank, size, timeout=limit)
            kind = _group_class.BackendType.GLOO
        group._register_backend(torch.device(type_), kind, new)
    group._set_group_name(name)
    group._set_group_desc(group_desc or f"{self.group_desc}:split")
    return group


# -- reductions ----------------------------------------------------------------------------

#: The reduction of the collective that the thread calls. Python cannot read all of its
#: parts from the C++ object that the operator gets.
_local: Final[Any] = threading.local()
_SUM: Final[Any] = (vars(dist.ReduceOp.RedOpType)["SUM"], 1.0)


def current_reduction() -> tuple[Any, Any]:
    """Return the current reduction, and the factor of a PREMUL_SUM.

    The reduction is a sum if C++ itself calls the collective. Source: ``AllreduceOptions``
    and ``ReduceScatterOptions`` of ``torch/csrc/distributed/c10d/Types.hpp``.
    """
    found: tuple[Any, Any] = getattr(_local, "reduction", _SUM)
    return found


def _noting_reduction(name: str) -> Any:
    original = vars(_group_class)[name]

    @functools.wraps(getattr(_group_class, name))
    def call(self: Any, *args: Any, **options: Any) -> Any:
        for each in (*args, *options.values()):
            operation = getattr(each, "reduceOp", each)
            if isinstance(operation, dist.ReduceOp.RedOpType):
                operation = dist.ReduceOp(operation)
            if isinstance(operation, dist.ReduceOp):
                _local.reduction = cast("Any", operation).__getstate__()
        try:
            return original.__get__(self, type(self))(*args, **options)
        finally:
            _local.reduction = _SUM

    return call


_NAMES: Final[dict[str, Any]] = {
    "_register_backend": _register_backend,
    "_start_coalescing": _start_coalescing,
    "_end_coalescing": _end_coalescing,
    "split_group": _split_group,
    "abort": _ending("abort"),
    "shutdown": _ending("shutdown"),
}
_REDUCING: Final = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
)
_original: Final = {
    name: getattr(_group_class, name) for name in _NAMES if hasattr(_group_class, name)
}

#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[list[tuple[Any, str, Any]]] = []
if dist.is_gloo_available():
    REPLACEMENTS[:] = [
        *((_group_class, name, _NAMES[name]) for name in _original),
        *(
            (_group_class, name, _noting_reduction(name))
            for name in _REDUCING
            if name in vars(_group_class)
        ),
        *(
            (owner, name, value)
            for owner in (dist, distributed_c10d, c10d)
            for name, value in ((each.__name__, each) for each in _CLASSES)
        ),
        (c10d, "_DEFAULT_PG_NCCL_TIMEOUT", DEFAULT_TIMEOUT),
        (constants, "default_pg_nccl_timeout", DEFAULT_TIMEOUT),
        (distributed_c10d, "default_pg_nccl_timeout", DEFAULT_TIMEOUT),
        (distributed_c10d, "_NCCL_AVAILABLE", True),
        (distributed_c10d, "_create_process_group_wrapper", _wrapped),
    ]
