"""Streams and events of the simulated cards: all work completes immediately.

Work on a simulated card is complete when the call returns, so every event is complete
when it is recorded. Streams still matter to the allocator: a block belongs to the stream
on which it was requested.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.cuda._utils import _get_device_index

from pytest_gpumem.devices.cuda_errors import cuda_error
from pytest_gpumem.devices.simulated.capture import (
    capture_of,
    check_event,
    check_waiting,
    note_wait,
)
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.tensor import DEVICES

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.capture import Capture
    from pytest_gpumem.devices.simulated.card import SimulatedCard

_handles: Final = itertools.count(1)
#: The priorities of streams that have one other than 0, by handle.
_priorities: Final[dict[int, int]] = {}
#: The number of the highest priority. Source: ``CUDAStream::priority_range`` and
#: ``max_compile_time_stream_priorities`` of ``c10/cuda/CUDAStream.h``.
_HIGHEST: Final = -3
_CUDA_TYPE: Final = 1  # c10::DeviceType::CUDA
#: Bytes of an event's handle. Source: ``CUDA_IPC_HANDLE_SIZE`` of ``driver_types.h``.
_HANDLE_BYTES: Final = 64


def named_index(device: Any) -> int | None:
    """Return the index of a device; None means the thread's current card."""
    if device is None or isinstance(device, int):
        return device
    index: int | None = torch.device(device).index
    return index


class Stream:
    """``torch.cuda.Stream`` on a simulated card.

    Args:
        device: The card; None means the thread's current one.
        priority: Stored and reported, without effect; the nearest that PyTorch has.
        stream_id: Handle of an existing stream, from torch's own code.
        device_index: Index of the card, from torch's own code.
    """

    def __init__(
        self,
        device: Any = None,
        priority: int = 0,
        *,
        stream_id: int | None = None,
        device_index: int | None = None,
        device_type: int = _CUDA_TYPE,
        stream_ptr: int | None = None,
    ) -> None:
        if device_index is None:
            if device is not None:
                torch.cuda.init()
            device_index = _get_device_index(device, optional=True)
            device_index = card_of(device_index).index
        self.device_index = device_index
        self.device = DEVICES[device_index]
        self.device_type = device_type
        given = stream_id if stream_id is not None else stream_ptr
        if given is None:
            card_of(device_index).make_context()
        self.stream_id = next(_handles) if given is None else given
        # Source: ``getStreamFromPool`` of ``c10/cuda/CUDAStream.cpp``.
        nearest = min(0, max(_HIGHEST, priority))
        if given is None and nearest:
            _priorities[self.stream_id] = nearest

    @property
    def priority(self) -> int:
        """The stream's priority; a lower number is a higher priority."""
        return _priorities.get(self.stream_id, 0)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the lowest and the highest priority."""
        return 0, _HIGHEST

    @property
    def cuda_stream(self) -> int:
        """The stream's handle as an ``int``; 0 is the default stream."""
        return self.stream_id

    native_handle = cuda_stream

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.cuda_stream)

    def wait_stream(self, stream: Any) -> None:
        """Wait for a stream. This only has an effect on a stream that is captured."""
        self.wait_event(stream.record_event())

    def wait_event(self, event: Any) -> None:
        """Wait for an event, which is complete; this stream joins the event's capture."""
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event, by default a new one, and return it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        """Return True, because all work is complete.

        Raises:
            torch.AcceleratorError: The stream is being captured (CUDA's message).
        """
        check_waiting(card_of(self.device_index), self.stream_id)
        return True

    def synchronize(self) -> None:
        """Wait for all work, which is already complete.

        Raises:
            torch.AcceleratorError: The stream is being captured (CUDA's message).
            RuntimeError: ``torch.cuda.set_sync_debug_mode`` asks for an error.
        """
        card = card_of(self.device_index)
        note_wait(card.machine)
        check_waiting(card, self.stream_id)

    def is_capturing(self) -> bool:
        """Return whether a CUDA graph is being captured on this stream."""
        return capture_of(card_of(self.device_index), self.stream_id) is not None

    def __enter__(self) -> Stream:  # noqa: PYI034  # Self needs Python 3.11
        machine = current_machine()
        self._outer = machine.streams.current(self.device_index)
        machine.streams.set(self.device_index, self.stream_id)
        return self

    def __exit__(self, *_exc: object) -> None:
        current_machine().streams.set(self.device_index, self._outer)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Stream)
            and other.stream_id == self.stream_id
            and other.device_index == self.device_index
        )

    def __hash__(self) -> int:
        return hash((self.stream_id, self.device_index))

    def __repr__(self) -> str:
        return (
            f"<torch.cuda.Stream device={self.device} "
            f"cuda_stream={hex(self.cuda_stream)}>"
        )


class Event:
    """``torch.cuda.Event`` on a simulated card; complete when it is recorded."""

    def __init__(
        self,
        enable_timing: bool = False,  # noqa: FBT001, FBT002  # torch's signature
        blocking: bool = False,  # noqa: FBT001, FBT002  # torch's signature
        interprocess: bool = False,  # noqa: FBT001, FBT002  # torch's signature
        external: bool = False,  # noqa: ARG002, FBT001, FBT002  # torch's signature
        *,
        device: Any = None,
    ) -> None:
        self.enable_timing = enable_timing
        self.blocking = blocking
        self._interprocess = interprocess
        self._recorded_s: float | None = None
        #: The capture in which the event was recorded, and its stream.
        self._capture: Capture | None = None
        self._stream = 0
        self._handle = next(_handles)
        #: The card of a recorded event. Before the first record it is None for a
        #: ``torch.cuda.Event``, and a device without an index for a ``torch.Event``, even
        #: if it was created with an index.
        #: Source: ``THPEvent_pynew`` of ``torch/csrc/Event.cpp``, which takes the type.
        self.device: torch.device | None = None
        if device is not None:
            self.device = torch.device(torch.device(device).type)

    @classmethod
    def from_ipc_handle(cls, device: Any, handle: bytes) -> Event:
        """Return an event that another process has made; it is complete.

        Raises:
            RuntimeError: The handle is of another size (torch's message).
            torch.AcceleratorError: This process has made it (CUDA's message).
        """
        if len(handle) != _HANDLE_BYTES:
            raise RuntimeError(
                "cudaIpcEventHandle_t expects byte-like object of size "
                f"{_HANDLE_BYTES}, but got {len(handle)}"
            )
        event = cls(interprocess=True)
        event._create(card_of(named_index(device)))  # the same class
        if int.from_bytes(handle[:8], "little") == os.getpid():
            raise cuda_error("cudaErrorDeviceUninitialized")
        event._recorded_s = time.perf_counter()  # the same class
        return event

    def ipc_handle(self) -> bytes:
        """Return a handle with which another process opens the event.

        Raises:
            torch.AcceleratorError: The event is not one for other processes (CUDA's
                message).
        """
        self._create(card_of(None if self.device is None else self.device.index))
        if not self._interprocess:
            raise cuda_error("cudaErrorInvalidResourceHandle")
        own = os.getpid().to_bytes(8, "little") + self._handle.to_bytes(8, "little")
        return own.ljust(_HANDLE_BYTES, b"\0")

    def _create(self, card: SimulatedCard) -> None:
        """Create the event on a card, as its first use does.

        Raises:
            torch.AcceleratorError: An event for other processes cannot take the time
                (CUDA's message). Source: ``cudaEventCreateWithFlags``.
        """
        card.make_context()
        if self.device is None or self.device.index is None:
            self.device = DEVICES[card.index]
        if self._interprocess and self.enable_timing:
            raise cuda_error("cudaErrorInvalidValue")

    @property
    def cuda_event(self) -> int:
        """The event's handle; 0 until the event is recorded."""
        return 0 if self._recorded_s is None else self._handle

    event_id = cuda_event

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.cuda_event)

    def __repr__(self) -> str:
        handle = self.cuda_event
        return f"<torch.cuda.Event {f'{handle:#x}' if handle else 'uninitialized'}>"

    def record(self, stream: Stream | None = None) -> None:
        """Store the host's time and the capture of the stream.

        Raises:
            RuntimeError: The event belongs to another card than the stream, or this is a
                forked child of a process that has used CUDA.
        """
        if stream is None:
            torch.cuda.init()
        card = card_of(None if stream is None else stream.device_index)
        made_on = None if self.device is None else self.device.index
        if made_on not in {None, card.index}:
            # Source: ``CUDAEvent::record``.
            raise RuntimeError(
                f"Event device {made_on} does not match recording stream's "
                f"device {card.index}."
            )
        self._create(card)
        self._recorded_s = time.perf_counter()
        self._capture = None
        if card.machine.captures:
            self._stream = _handle(stream, card)
            self._capture = capture_of(card, self._stream)

    def wait(self, stream: Stream | None = None) -> None:
        """Make a stream wait for the event, or join the event's capture."""
        if self._capture is not None:
            self._capture.join(_handle(stream, self._capture.card), self._stream)

    def query(self) -> bool:
        """Return True, because the event is complete.

        Raises:
            torch.AcceleratorError: The event was recorded in a capture (CUDA's message).
        """
        self.synchronize()
        return True

    def synchronize(self) -> None:
        """Wait for the event, which is already complete.

        Raises:
            torch.AcceleratorError: The event was recorded in a capture (CUDA's message).
        """
        check_event(self._capture)

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds of *host* time between two events.

        Raises:
            ValueError: One of the events was made without timing, or was not recorded.
            torch.AcceleratorError: The events are of different cards (CUDA's message).
        """
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError(
                "Both events must be created with argument 'enable_timing=True'."
            )
        if self._recorded_s is None or end_event._recorded_s is None:  # the same class
            raise ValueError(
                "Both events must be recorded before calculating elapsed time."
            )
        if self.device != end_event.device:
            raise cuda_error("cudaErrorInvalidResourceHandle")
        return (end_event._recorded_s - self._recorded_s) * 1e3  # the same class


def _handle(stream: Stream | None, card: SimulatedCard) -> int:
    """Return the handle of a stream; None means the thread's current one."""
    if stream is None:
        return card.machine.streams.current(card.index)
    return stream.stream_id


class _NameType(type):
    """Metaclass of the replacement of a torch class that does not know simulated cards."""

    original: type
    simulated: type

    def __call__(cls, *args: Any, **options: Any) -> Any:
        named = args[0] if args else options.get("device")
        if named is None:
            named = torch.device("cuda")
        elif isinstance(named, int):
            named = torch.device("cuda", named)
        if torch.device(named).type == "cuda":
            options["device"] = named
            return cls.simulated(*args[1:], **options)
        return cls.original(*args, **options)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, (cls.original, cls.simulated))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, (cls.original, cls.simulated))


class StreamName(metaclass=_NameType):
    """Replaces ``torch.Stream`` while cards are simulated; its default is a card."""

    # The module name that pickles contain.
    __module__ = "torch"
    __qualname__ = "Stream"

    original = torch.Stream
    simulated = Stream


class EventName(metaclass=_NameType):
    """Replaces ``torch.Event`` while cards are simulated; its default is a card."""

    # The module name that pickles contain.
    __module__ = "torch"
    __qualname__ = "Event"

    original = torch.Event
    simulated = Event


def stream_triple(index: int, stream: int) -> tuple[int, int, int]:
    """Return a stream in torch's internal form: handle, card, device type."""
    return stream, index, _CUDA_TYPE
