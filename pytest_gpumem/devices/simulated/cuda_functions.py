"""The C functions behind ``torch.cuda`` and ``torch.accelerator``, for simulated cards.

Torch's own Python code is not changed. The functions of ``torch._C`` that it calls are
replaced: those that a CUDA build has and that would call a driver.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

import torch

from pytest_gpumem.allocator.pools import DEFAULT
from pytest_gpumem.allocator.snapshot import snapshot
from pytest_gpumem.allocator.stats import PRIVATE
from pytest_gpumem.devices.simulated import rng
from pytest_gpumem.devices.simulated.capture import check_waiting, set_sync_debug_mode
from pytest_gpumem.devices.simulated.comm import C_COLLECTIVES
from pytest_gpumem.devices.simulated.distributed.one_process import C_NCCL
from pytest_gpumem.devices.simulated.graphs import C_GRAPHS
from pytest_gpumem.devices.simulated.interprocess import collect
from pytest_gpumem.devices.simulated.jiterator import launch
from pytest_gpumem.devices.simulated.libraries import C_LIBRARIES
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.memory import memory_of
from pytest_gpumem.devices.simulated.memory_history import MemoryHistory
from pytest_gpumem.devices.simulated.nvtx import Nvtx
from pytest_gpumem.devices.simulated.operators.attention import C_ATTENTION
from pytest_gpumem.devices.simulated.properties import DeviceProperties
from pytest_gpumem.devices.simulated.raw_memory import enable, raw_alloc, raw_delete
from pytest_gpumem.devices.simulated.refusals import C_REFUSALS
from pytest_gpumem.devices.simulated.runtime import Runtime
from pytest_gpumem.devices.simulated.streams import Event, Stream, stream_triple
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor
from pytest_gpumem.devices.simulated.tensor_lists import grouping
from pytest_gpumem.devices.simulated.torch_build import compiled_version
from pytest_gpumem.devices.simulated.typed import typed_tensors
from pytest_gpumem.kernels.cublas import workspace_bytes
from pytest_gpumem.living_objects import living

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_T = TypeVar("_T")


def _nested(flat: dict[str, int]) -> dict[str, Any]:
    """Convert ``"a.b.c": n`` to nested dictionaries, as C++ returns them."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested


def _set_device(index: int) -> None:
    """Make a card the thread's current one; on a change, CUDA creates a context.

    Source: ``c10::cuda::SetDevice`` of ``c10/cuda/CUDAFunctions.cpp``; ``cudaSetDevice``
    initialises the context since CUDA 12.
    """
    machine = current_machine()
    if index < 0:
        return
    torch.cuda.init()
    card, is_another = machine.card(index), index != machine.current_index
    machine.current_index = index
    if is_another:
        card.make_context()


def _count() -> int:
    """Return the number of cards; a process that is forked from then on has none.

    Source: ``THCPModule_getDeviceCount_wrap`` of ``torch/csrc/cuda/Module.cpp``.
    """
    machine = current_machine()
    machine.use()
    machine.spoils_forks = True
    return len(machine.cards)


def _initialized(function: Callable[..., _T]) -> Callable[..., _T]:
    """Return a function that initialises CUDA first, which a forked child cannot.

    Source: ``maybe_initialize_device`` in ``torch/csrc/DeviceAccelerator.cpp``.
    """

    def call(*args: Any) -> _T:
        torch.cuda.init()
        return function(*args)

    return call


def _init() -> None:
    """Initialise CUDA, and create the generators of all cards.

    Source: ``torch/csrc/cuda/Module.cpp``, ``THCPModule_initExtension``.
    """
    machine = card_of(None).machine
    machine.is_initialized = machine.spoils_forks = True
    generators: Any = tuple(map(rng.generator_of, machine.cards))
    torch.cuda.default_generators = generators


def _has_context(index: int) -> bool:
    """Return whether a card has a context.

    Raises:
        RuntimeError: There is no such card.

    Source: ``hasPrimaryContext`` in ``aten/src/ATen/cuda/detail/CUDAHooks.cpp``.
    """
    cards = current_machine().cards
    if not 0 <= index < len(cards):
        raise RuntimeError(
            "hasPrimaryContext expects a valid device index, but got "
            f"device_index={index}"
        )
    return cards[index].driver.has_context


def _exchange_device(index: int) -> int:
    # Source: ``torch/csrc/cuda/Module.cpp``, ``THCPModule_exchangeDevice``.
    if index < 0:
        return -1
    torch.cuda.init()
    previous = card_of(None).index
    _set_device(index)
    return previous


def _maybe_exchange_device(index: int) -> int:
    """Make a card current as ``_exchange_device`` does, but create no context.

    Source: ``c10::cuda::MaybeExchangeDevice`` of ``c10/cuda/CUDAFunctions.cpp``.
    """
    if index < 0:
        return -1
    torch.cuda.init()
    previous = card_of(None).index
    current_machine().current_index = index
    return previous


def _memory_stats(index: int) -> dict[str, Any]:
    nested = _nested(card_of(index).memory_stats())
    pools = nested.pop(PRIVATE, {})
    if _TELLS_OF_POOLS:  # the keys are pool ids, which are pairs of numbers
        nested[PRIVATE] = {tuple(map(int, k.split("_"))): v for k, v in pools.items()}
    return nested


#: Whether torch's Python code supports keys that are pairs; it does since torch 2.13.
_TELLS_OF_POOLS: Final = PRIVATE in (torch.cuda.memory_stats.__doc__ or "")


def _reset_peaks(index: int) -> None:
    with card_of(index).locked() as allocator:
        allocator.reset_peak_stats()


def _reset_totals(index: int) -> None:
    with card_of(index).locked() as allocator:
        allocator.reset_accumulated_stats()


def _empty_cache(*_pool: Any) -> None:
    for card in current_machine().cards:
        card.empty_cache()


def _clear_workspaces() -> None:
    for card in current_machine().cards:
        card.clear_workspaces()


def _set_fraction(fraction: float, index: int) -> None:
    card_of(index).fraction = fraction


def _get_fraction(index: int) -> float:
    return card_of(index).fraction


def _snapshot(pool: Any = None) -> dict[str, Any]:
    machine = current_machine()
    pool_id = tuple(pool[:2]) if pool else DEFAULT
    segments: list[Any] = []
    for card in machine.cards:
        with card.locked() as allocator:
            found = snapshot(allocator, pool_id)
        segments.extend(found)
        if machine.history is not None:
            active = sum(each["active_size"] for each in found)
            machine.history.note(card.index, "snapshot", 0, active, 0, pool_id)
    return {
        "segments": segments,
        "device_traces": _device_traces(),
        "allocator_settings": _settings(),
        "external_annotations": [],
    }


def _device_traces() -> list[list[dict[str, Any]]]:
    machine = current_machine()
    if machine.history is None:
        return [[] for _ in machine.cards]
    kept = machine.history.entries[: len(machine.cards)]
    return [list(entries) for entries in kept]


def _settings() -> dict[str, Any]:
    """Return the allocator's settings with the names that torch uses in a snapshot.

    Source: ``torch/csrc/cuda/memory_snapshot.cpp``.
    """
    config = current_machine().all_cards[0].allocator.config
    return {
        "PYTORCH_CUDA_ALLOC_CONF": config.text,
        "max_split_size": config.max_split_size,
        "garbage_collection_threshold": config.gc_threshold,
        "expandable_segments": config.expandable_segments,
    }


def _current_stream(index: int) -> tuple[int, int, int]:
    card = card_of(None if index < 0 else index)
    return stream_triple(card.index, current_machine().streams.current(card.index))


def _default_stream(index: int) -> tuple[int, int, int]:
    return stream_triple(card_of(None if index < 0 else index).index, 0)


def _set_stream(*, stream_id: int, device_index: int, device_type: int) -> None:  # noqa: ARG001  # torch's keywords
    current_machine().streams.set(device_index, stream_id)
    current_machine().current_index = device_index


def _observe_ooms(observer: Any) -> None:
    current_machine().user_oom_observers.append(observer)


def _record_history(  # noqa: PLR0917  # torch's own signature
    enabled: str | None,
    context: str | None = "all",
    stacks: str = "all",  # noqa: ARG001  # only Python frames exist
    max_entries: int = sys.maxsize,
    clear_history: bool = False,  # noqa: FBT001, FBT002  # torch's signature
    compile_context: bool = False,  # noqa: ARG001, FBT001, FBT002  # torch's signature
    global_record_annotations: bool = False,  # noqa: ARG001, FBT001, FBT002  # torch's signature
    skip_actions: Sequence[str] = (),
    *_later: Any,  # options of newer torch versions for the host and the driver
) -> None:
    if enabled not in (None, "state", "all"):
        raise RuntimeError(f"Unknown enabled: {enabled!r}; None, 'state' or 'all'")
    machine = current_machine()
    kept = machine.history
    if enabled is None:
        machine.stop_history()
        return
    history = MemoryHistory(
        len(machine.all_cards),
        keeps_entries=enabled == "all",
        context=context,
        max_entries=max_entries,
        skip_actions=skip_actions,
    )
    if kept is not None and not clear_history:
        for old, new in zip(kept.entries, history.entries, strict=True):
            new.extend(old)
    machine.start_history(history)


def _record_history_legacy(
    enabled: bool,  # noqa: FBT001  # torch's signature
    record_context: bool = True,  # noqa: FBT001, FBT002  # torch's signature
    max_entries: int = 1,
    *_rest: Any,
) -> None:
    context = "alloc" if record_context else None
    _record_history("all" if enabled else None, context, "all", max_entries)


def _allocation_traceback(pointer: int) -> list[dict[str, Any]] | None:
    """Return the frames that requested a block; None for an unknown address.

    Args:
        pointer: The address of a living tensor's storage, or of a block in a snapshot.
    """
    address = _block_address(pointer)
    for segment in _snapshot()["segments"]:
        for block in segment["blocks"]:
            if block["address"] == address and block["frames"]:
                frames: list[dict[str, Any]] = block["frames"]
                return frames
    return None


def _block_address(pointer: int) -> int:
    """Return the address on the card of the storage whose values are at an address."""
    for each in living(SimulatedTensor)[0]:
        storage = each._gpumem_value.untyped_storage()
        memory = memory_of(storage)
        if memory and memory.block and storage.data_ptr() == pointer:
            return memory.block.address
    return pointer


def _arch_flags() -> str:
    """Return the architecture flags of a torch build for the machine's cards."""
    capabilities = {
        card.card.compute_capability for card in current_machine().all_cards
    }
    return " ".join(f"sm_{major}{minor}" for major, minor in sorted(capabilities))


def _host_stats() -> dict[str, Any]:
    """Return the statistics of the pinned-memory cache, which is always empty.

    Source: ``torch/cuda/memory.py``, ``host_memory_stats`` (the keys).
    """
    none = {"current": 0, "peak": 0, "allocated": 0, "freed": 0}
    time_spent = {"total": 0, "max": 0, "min": 0, "count": 0, "avg": 0}
    return {
        "num_host_alloc": 0,
        "num_host_free": 0,
        **{
            name: dict(none)
            for name in (
                "allocations",
                "allocated_bytes",
                "active_requests",
                "active_bytes",
            )
        },
        "host_alloc_time": dict(time_spent),
        "host_free_time": dict(time_spent),
    }


def _mem_get_info(index: int | None) -> tuple[int, int]:
    card = card_of(index)
    card.make_context()
    return card.mem_get_info()


def _synchronize(index: int | None = None) -> None:
    """Do nothing but create a context, as CUDA does; all work is already complete."""
    card = card_of(None if index is None or index < 0 else index)
    card.make_context()
    check_waiting(card)


def _stream_of(index: int | None) -> Stream:
    card = card_of(None if index is None or index < 0 else index)
    return Stream(
        stream_id=current_machine().streams.current(card.index), device_index=card.index
    )


def _no_capabilities(_index: int) -> NoReturn:
    """Refuse as torch does on a card.

    Source: ``DeviceGuardImplInterface::getDeviceCapability``, torch 2.13.
    """
    raise RuntimeError("Backend doesn't support getting device capabilities.")


def _accelerator_set_stream(stream: Stream) -> None:
    _set_stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=1
    )


def _renew_settings(text: str) -> None:
    """Change the settings of every card's allocator for later requests.

    Raises:
        ValueError: Torch refuses a key or value, or the model does not support it.
    """
    cards = current_machine().cards
    config = cards[0].allocator.config.renewed(text)
    for card in cards:
        with card.locked() as allocator:
            allocator.config = config


def _workspace_size() -> int:
    card = card_of(None)
    setting = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return workspace_bytes(card.card.compute_capability, setting)


def _cudnn_setter(name: str) -> Callable[[Any], None]:
    def set_it(value: Any) -> None:
        current_machine().cudnn[name] = value

    return set_it


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing, because there is no work to wait for and nothing to collect."""


#: Replacements in ``torch._C``, with the names of torch 2.8 to 2.15.
C_FUNCTIONS: Final[dict[str, Any]] = {
    "_cuda_init": _init,
    "_cuda_isInBadFork": lambda: current_machine().is_forked,
    "_cuda_getDeviceCount": _count,
    "_cuda_hasPrimaryContext": _has_context,
    "_cuda_getDevice": lambda: card_of(None).index,
    "_cuda_setDevice": _set_device,
    "_cuda_exchangeDevice": _exchange_device,
    "_cuda_maybeExchangeDevice": _maybe_exchange_device,
    "_cuda_memoryStats": _memory_stats,
    "_cuda_resetPeakMemoryStats": _reset_peaks,
    "_cuda_resetAccumulatedMemoryStats": _reset_totals,
    "_cuda_emptyCache": _empty_cache,
    "_cuda_setMemoryFraction": _set_fraction,
    "_cuda_getMemoryFraction": _get_fraction,
    "_cuda_memorySnapshot": _snapshot,
    "_cuda_synchronize": _synchronize,
    "_cuda_ipc_collect": collect,
    "_cuda_lock_mutex": _nothing,
    "_cuda_unlock_mutex": _nothing,
    "_cuda_getCurrentStream": _current_stream,
    "_cuda_getCurrentRawStream": lambda index: _current_stream(index)[0],
    "_cuda_getDefaultStream": _default_stream,
    "_cuda_setStream": _set_stream,
    "_cuda_getAllocatorBackend": lambda: "native",
    "_cuda_cudaCachingAllocator_enable": enable,
    "_cuda_cudaCachingAllocator_is_enabled": lambda: True,
    "_cuda_cudaCachingAllocator_raw_alloc": raw_alloc,
    "_cuda_cudaCachingAllocator_raw_delete": raw_delete,
    "_cuda_getArchFlags": _arch_flags,
    "_cuda_canDeviceAccessPeer": lambda _device, _peer: True,
    "_cuda_get_sync_debug_mode": lambda: current_machine().sync_debug_mode,
    "_cuda_set_sync_debug_mode": set_sync_debug_mode,
    "_cuda_attach_out_of_memory_observer": _observe_ooms,
    "_cuda_clearCublasWorkspaces": _clear_workspaces,
    "_cuda_record_memory_history": _record_history,
    "_cuda_record_memory_history_legacy": _record_history_legacy,
    "_cuda_isHistoryEnabled": lambda: current_machine().history is not None,
    "_cuda_allocationTraceback": _allocation_traceback,
    "_cuda_getMemoryMetadata": lambda: "",
    "_cuda_setMemoryMetadata": _nothing,
    # What torch does with an allocator that keeps no metadata.
    "_cuda_memoryMetadataSupported": lambda: False,
    "_cuda_annotateMemory": _nothing,
    "_cuda_hostMemoryStats": _host_stats,
    "_cuda_resetPeakHostMemoryStats": _nothing,
    "_cuda_resetAccumulatedHostMemoryStats": _nothing,
    "_host_emptyCache": _nothing,
    "_cudart": Runtime(),
    "_nvtx": Nvtx(),
    "_CudaDeviceProperties": DeviceProperties,
    "_cuda_getCompiledVersion": compiled_version,
    "_cuda_getCublasWorkspaceSize": _workspace_size,
    # No other size can be set.
    "_cuda_resetCublasWorkspaceSize": _nothing,
    "_cuda_resetCublasLtWorkspaceSize": _nothing,
    "_cuda_get_cudnn_benchmark_limit": lambda: current_machine().cudnn["limit"],
    "_cuda_set_cudnn_benchmark_limit": _cudnn_setter("limit"),
    "_cuda_get_conv_benchmark_empty_cache": (
        lambda: current_machine().cudnn["empties_cache"]
    ),
    "_cudnn_set_conv_benchmark_empty_cache": _cudnn_setter("empties_cache"),
    "_cuda_sleep": _nothing,
    "_cuda_busy_wait_for_flag": _nothing,
    "_cuda_clear_flag": _nothing,
    "_cuda_getCurrentBlasHandle": lambda: 1,
    "_cuda_getCurrentSolverHandle": lambda: 1,
    "_cuda_jiterator_compile_and_launch_kernel": launch,
    **C_LIBRARIES,
    **C_REFUSALS,
    **C_GRAPHS,
    **C_ATTENTION,
    **C_COLLECTIVES,
    **C_NCCL,
    "_accelerator_getAccelerator": lambda: torch.device("cuda"),
    "_get_accelerator": lambda _check=None: torch.device("cuda"),
    "_group_tensors_by_device_and_dtype": grouping,
    "_accelerator_getDeviceIndex": _initialized(lambda: card_of(None).index),
    "_accelerator_getDeviceCapability": _no_capabilities,
    "_accelerator_getDefaultGenerator": (
        lambda index: torch.cuda.default_generators[index]
    ),
    "_accelerator_setDeviceIndex": _set_device,
    "_accelerator_exchangeDevice": _exchange_device,
    "_accelerator_maybeExchangeDevice": _maybe_exchange_device,
    "_accelerator_getStream": _initialized(_stream_of),
    "_accelerator_setStream": _initialized(_accelerator_set_stream),
    "_accelerator_synchronizeDevice": _initialized(_synchronize),
    "_accelerator_isAllocatorInitialized": lambda: True,
    "_accelerator_emptyCache": _empty_cache,
    "_accelerator_setAllocatorSettings": _renew_settings,
    "_accelerator_getAllocatorSettings": (
        lambda: current_machine().cards[0].allocator.config.text
    ),
    "_cuda_cudaCachingAllocator_set_allocator_settings": _renew_settings,
    "_accelerator_emptyHostCache": _nothing,
    "_accelerator_getDeviceStats": _memory_stats,
    "_accelerator_resetPeakStats": _reset_peaks,
    "_accelerator_resetAccumulatedStats": _reset_totals,
    "_accelerator_getMemoryInfo": _mem_get_info,
}


def _properties(index: int) -> DeviceProperties:
    return card_of(index).properties


def cuda_names() -> dict[str, Any]:
    """Return the replacements in ``torch.cuda`` itself.

    Torch counts cards with ``_raw_device_…_nvml`` before CUDA is initialised. These
    functions must never reach a real driver while cards are simulated.
    """
    return {
        "_cudart": C_FUNCTIONS["_cudart"],
        "_cached_device_count": None,
        "_raw_device_count_nvml": lambda: len(current_machine().gpus),
        "_raw_device_uuid_nvml": lambda: [each.uuid for each in current_machine().gpus],
        "_get_device_properties": _properties,
        "default_generators": (),
        "_initialized": False,
        "_queued_calls": [],
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _maybe_exchange_device,
        "Stream": Stream,
        "Event": Event,
        "_is_in_bad_fork": lambda: current_machine().is_forked,
        **typed_tensors(),
    }
