"""The functions below ``torch.cuda`` and ``torch.accelerator``, for simulated cards.

torch's own Python code stays as it is: what is replaced is what it calls, the
functions of ``torch._C`` that a CUDA build has and that would ask a driver.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from pytest_gpumem.devices.simulated import rng
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.properties import DeviceProperties
from pytest_gpumem.devices.simulated.streams import Event, Stream, stream_triple
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError
from pytest_gpumem.model.snapshot import snapshot


def _nested(flat: dict[str, int]) -> dict[str, Any]:
    """Turn ``"a.b.c": n`` into nested dictionaries, as the C++ side returns them."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested


def _set_device(index: int) -> None:
    if index >= 0:
        current_machine().current_index = index


def _exchange_device(index: int) -> int:
    previous = current_machine().current_index
    _set_device(index)
    return previous


def _maybe_exchange_device(index: int) -> int:
    # A function of its own: torch.compile tells the two apart by identity.
    return _exchange_device(index)


def _memory_stats(index: int) -> dict[str, Any]:
    return _nested(card_of(index).memory_stats())


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


def _snapshot(*_pool: Any) -> dict[str, Any]:
    segments: list[Any] = []
    for card in current_machine().cards:
        with card.locked() as allocator:
            segments.extend(snapshot(allocator))
    return {
        "segments": segments,
        "device_traces": [[] for _ in current_machine().cards],
        "allocator_settings": _settings(),
        "external_annotations": [],
    }


def _settings() -> dict[str, Any]:
    """Return the allocator's settings under torch's names for a snapshot.

    Source: ``torch/csrc/cuda/memory_snapshot.cpp``.
    """
    config = current_machine().cards[0].allocator.config
    return {
        "PYTORCH_CUDA_ALLOC_CONF": config.text,
        "max_split_size": config.max_split_size,
        "garbage_collection_threshold": config.gc_threshold,
        "expandable_segments": config.expandable_segments,
    }


def _current_stream(index: int) -> tuple[int, int, int]:
    card = card_of(None if index < 0 else index)
    return stream_triple(card.index, current_machine().current_stream(card.index))


def _default_stream(index: int) -> tuple[int, int, int]:
    return stream_triple(card_of(None if index < 0 else index).index, 0)


def _set_stream(*, stream_id: int, device_index: int, device_type: int) -> None:  # noqa: ARG001  # torch's keywords
    current_machine().set_stream(device_index, stream_id)
    current_machine().current_index = device_index


def _observe_ooms(observer: Any) -> None:
    for card in current_machine().cards:
        card.allocator.on_oom.append(observer)


def _raw_alloc(*_args: Any) -> int:
    raise UnsupportedOnSimulatedDeviceError(
        "torch.cuda.caching_allocator_alloc",
        "allocate a torch.uint8 tensor instead",
    )


def _mem_get_info(index: int | None) -> tuple[int, int]:
    return card_of(index).mem_get_info()


def _stream_of(index: int | None) -> Stream:
    card = card_of(None if index is None or index < 0 else index)
    return Stream(
        stream_id=current_machine().current_stream(card.index), device_index=card.index
    )


def _accelerator_set_stream(stream: Stream) -> None:
    _set_stream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=1
    )


def _capability(index: int) -> dict[str, Any]:
    raise NotImplementedError("the accelerator reports no dtype capability")


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing: what would wait or collect has nothing to wait for."""


#: Replacements in ``torch._C``; names as torch 2.11 to 2.13 calls them.
C_FUNCTIONS: Final[dict[str, Any]] = {
    "_cuda_init": _nothing,
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getDeviceCount": lambda: len(current_machine().cards),
    "_cuda_getDevice": lambda: current_machine().current_index,
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
    "_cuda_synchronize": _nothing,
    "_cuda_ipc_collect": _nothing,
    "_cuda_getCurrentStream": _current_stream,
    "_cuda_getCurrentRawStream": lambda index: _current_stream(index)[0],
    "_cuda_getDefaultStream": _default_stream,
    "_cuda_setStream": _set_stream,
    "_cuda_isCurrentStreamCapturing": lambda: False,
    "_cuda_getAllocatorBackend": lambda: "native",
    "_cuda_getArchFlags": lambda: "",
    "_cuda_canDeviceAccessPeer": lambda _device, _peer: True,
    "_cuda_get_sync_debug_mode": lambda: 0,
    "_cuda_set_sync_debug_mode": _nothing,
    "_cuda_attach_out_of_memory_observer": _observe_ooms,
    "_cuda_clearCublasWorkspaces": _clear_workspaces,
    "_cuda_cudaCachingAllocator_raw_alloc": _raw_alloc,
    "_accelerator_getAccelerator": lambda: torch.device("cuda"),
    "_accelerator_getDeviceIndex": lambda: current_machine().current_index,
    "_accelerator_setDeviceIndex": _set_device,
    "_accelerator_exchangeDevice": _exchange_device,
    "_accelerator_maybeExchangeDevice": _maybe_exchange_device,
    "_accelerator_getStream": _stream_of,
    "_accelerator_setStream": _accelerator_set_stream,
    "_accelerator_synchronizeDevice": _nothing,
    "_accelerator_isAllocatorInitialized": lambda: True,
    "_accelerator_emptyCache": _empty_cache,
    "_accelerator_emptyHostCache": _nothing,
    "_accelerator_getDeviceStats": _memory_stats,
    "_accelerator_resetPeakStats": _reset_peaks,
    "_accelerator_resetAccumulatedStats": _reset_totals,
    "_accelerator_getMemoryInfo": _mem_get_info,
}


class NoGraph:
    """``torch.cuda.CUDAGraph``, which cannot be simulated."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise UnsupportedOnSimulatedDeviceError(
            "torch.cuda.CUDAGraph",
            "run without capturing a graph, or on a real card",
        )


class _Success:
    """``cudaError`` with the one code that a simulated call ends in."""

    success = 0


class Runtime:
    """What ``torch.cuda.cudart()`` returns: the few runtime calls that libraries make."""

    cudaError = _Success  # noqa: N815  # the runtime's name

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:  # noqa: N802  # the runtime's name
        """Return free and total bytes of a card."""
        return _mem_get_info(device)

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802  # the runtime's name
        """Return the text of an error code."""
        return "no error" if code == 0 else f"error {code}"

    def cudaProfilerStart(self) -> int:  # noqa: N802  # the runtime's name
        """Start nothing; 0 is success."""
        return 0

    def cudaProfilerStop(self) -> int:  # noqa: N802  # the runtime's name
        """Stop nothing; 0 is success."""
        return 0

    def cudaHostRegister(self, *_args: Any) -> int:  # noqa: N802  # the runtime's name
        """Pin nothing; 0 is success."""
        return 0

    def cudaHostUnregister(self, *_args: Any) -> int:  # noqa: N802  # the runtime's name
        """Unpin nothing; 0 is success."""
        return 0


def cuda_names() -> dict[str, Any]:
    """Return the replacements in ``torch.cuda`` itself.

    ``_device_count_nvml`` is torch's fork-safe count through NVML: it must never
    reach a real driver while the cards are simulated ones.
    """
    machine = current_machine()
    return {
        "_cudart": Runtime(),
        "_cached_device_count": None,
        "_device_count_nvml": lambda: len(current_machine().cards),
        "_get_device_properties": lambda index: DeviceProperties(
            card_of(index).card, index
        ),
        "default_generators": tuple(rng.generator_of(card) for card in machine.cards),
        "_initialized": False,
        "_queued_calls": [],
        "_exchange_device": _exchange_device,
        "_maybe_exchange_device": _maybe_exchange_device,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": NoGraph,
    }
